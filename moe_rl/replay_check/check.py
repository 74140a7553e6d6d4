"""Replay check: the independent checker of record and replay on a model.

Each check is one law. What a law is compared with comes from elsewhere than the taps: bitwise
equality of outputs and gradients, what the experts are called with, the formula of the family,
and finite differences.
"""

from collections.abc import Callable

from torch import nn

from moe_rl.replay_check import check_routing, check_training
from moe_rl.replay_check.check_subject import Subject
from moe_rl.replay_check.claims import Claims, LawResult, judge_law
from moe_rl.replay_check.families import Formula

LAWS: dict[str, Callable[[Subject], Claims]] = {
    "record": check_routing.law_record,
    "replay": check_routing.law_replay,
    "foreign": check_routing.law_foreign,
    "weights": check_routing.law_weights,
    "gradient": check_training.law_gradient,
    "gaps": check_routing.law_gaps,
    "padding": check_routing.law_padding,
    "cache": check_routing.law_cache,
    "checkpointing": check_training.law_checkpointing,
    "bf16": check_training.law_bf16,
}


def check_replay(
    model: nn.Module, *, formula: Formula | None = None, seed: int = 0
) -> list[LawResult]:
    """Check record and replay on `model` against every law.

    The model runs in eval mode on random tokens, on its own device and in its own dtype; its
    weights and mode are restored, its gradients cleared.

    Args:
        formula: the gate weights of its routers; None leaves the law `weights` out.
        seed: seed of tokens and foreign routes.

    Raises:
        ValueError: the model has no router that can be recorded, see `find_routers`.
    """
    was_training = model.training
    subject = Subject(model.eval(), formula, seed)
    results = []
    try:
        for name, law in LAWS.items():
            results.append(judge_law(name, law(subject)))
            model.zero_grad(set_to_none=True)
    finally:
        model.train(was_training)
    return results
