"""Replay check: the independent checker of record and replay on a model.

    for finding in check_replay(model): print(finding)

Each check is one law. What a law is held against comes from elsewhere than the taps: bitwise
equality of outputs and gradients, what the experts are called with, the formula of the family,
and finite differences.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
from moe_rl.replay_check.check_subject import LawBroken, NotApplicable, Subject
from moe_rl.replay_check.check_training import law_bf16, law_checkpointing, law_gradient
from moe_rl.replay_check.gate_formula import Formula


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    check: str
    """Name of the law, a key of `LAWS`."""
    passed: bool | None
    """None: not applicable."""
    reason: str
    """What is wrong, or why the law does not apply; empty where it holds."""


LAWS: dict[str, Callable[[Subject], None]] = {
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
) -> list[Finding]:
    """Hold record and replay on `model` against every law.

    The model is used in eval mode with random tokens, on its own device and in its own type; its
    weights, gradients (cleared) and mode are afterwards as before.

    Args:
        model: a model that `find_routers` accepts.
        formula: the gate weights of its routers; None leaves the law `weights` out.
        seed: seed of tokens and foreign routes.

    Raises:
        ValueError: the model has no router that can be recorded, see `find_routers`.
    """
    was_training = model.training
    subject = Subject(model.eval(), formula, seed)
    try:
        return [_find(name, law, subject) for name, law in LAWS.items()]
    finally:
        model.train(was_training)


def _find(name: str, law: Callable[[Subject], None], subject: Subject) -> Finding:
    try:
        law(subject)
    except NotApplicable as why:
        return Finding(check=name, passed=None, reason=str(why))
    except LawBroken as broken:
        return Finding(check=name, passed=False, reason=str(broken))
    except (ValueError, RuntimeError) as error:
        # What a model or a tap raises under a law is a finding about it.
        return Finding(check=name, passed=False, reason=f"{type(error).__name__}: {error}")
    finally:
        subject.model.zero_grad(set_to_none=True)
    return Finding(check=name, passed=True, reason="")
