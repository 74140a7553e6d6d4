"""Replay check: the independent checker of record and replay on a model.

    for result in check_replay(model): print(result)

Each check is one law. What a law is compared with comes from elsewhere than the taps: bitwise
equality of outputs and gradients, what the experts are called with, the formula of the family,
and finite differences.
"""

from collections.abc import Callable

from torch import nn

from moe_rl.replay_check.check_routing import (
    law_cache,
    law_foreign,
    law_gaps,
    law_padding,
    law_record,
    law_replay,
    law_weights,
)
from moe_rl.replay_check.check_subject import Subject
from moe_rl.replay_check.check_training import law_bf16, law_checkpointing, law_gradient
from moe_rl.replay_check.claims import Claims, LawResult, judge_law
from moe_rl.replay_check.gate_formula import Formula

LAWS: dict[str, Callable[[Subject], Claims]] = {
    "record": law_record,
    "replay": law_replay,
    "foreign": law_foreign,
    "weights": law_weights,
    "gradient": law_gradient,
    "gaps": law_gaps,
    "padding": law_padding,
    "cache": law_cache,
    "checkpointing": law_checkpointing,
    "bf16": law_bf16,
}


def check_replay(
    model: nn.Module, *, formula: Formula | None = None, seed: int = 0
) -> list[LawResult]:
    """Check record and replay on `model` against every law.

    The model runs in eval mode on random tokens, on its own device and in its own dtype; its
    weights and mode are restored, its gradients cleared.

    Args:
        model: a model that `find_routers` accepts.
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
