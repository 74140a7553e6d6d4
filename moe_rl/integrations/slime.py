"""slime, miles and vime: the engine against the trainer, through the hooks that they call by path.

    --use-tis --custom-tis-function-path moe_rl.integrations.slime.measure
    --custom-rollout-log-function-path moe_rl.integrations.slime.log_rollout

`measure` corrects nothing and returns what it measured; `log_rollout` reads the engine's record of
a rollout and may write it for `moe-rl inspect` (set MOE_RL_RECORD to a folder). Written against
slime's signatures of July 2026 (THUDM/slime 0d234f3, 141e5ef); nothing of slime is imported.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_rl.config import ConfigError
from moe_rl.metrics.ratios import mismatch_statistics, ratio_statistics, ratio_tail
from moe_rl.recorded import (
    RecordedBatch,
    inspect_batch,
    response_rows,
    versions_between,
    write_batch,
)

PREFIX = "moe_rl/"
RECORD = "MOE_RL_RECORD"
"""Environment variable: a folder for the batches that `log_rollout` writes."""

_NOTHING = torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)

logger = logging.getLogger(__name__)


def measure(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **unused: Any,
) -> tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]:
    """The policy loss and the masks as they are, and metrics of trainer against engine.

    slime takes means over tokens of what a function of this kind returns, so each number comes as a
    tensor of the loss's shape that is that number everywhere, and adds them up by name, so that
    every micro-batch has every name: 0 where no token counts, which adds nothing, and NaN under
    context parallelism, where a rank has parts of log-probs and whole masks.
    """
    pairs = zip(train_log_probs, loss_masks, strict=True)
    if any(len(values) != len(own) for values, own in pairs):
        found = dict.fromkeys(_statistics(*_NOTHING), math.nan)
    elif not any(bool(own.any()) for own in loss_masks):
        found = dict.fromkeys(_statistics(*_NOTHING), 0.0)
    else:
        mask = _pad([part.bool() for part in loss_masks])
        found = _statistics(_pad(train_log_probs), _pad(rollout_log_probs), mask)
    metrics = {
        f"{PREFIX}{name}": torch.full_like(pg_loss.detach(), value) for name, value in found.items()
    }
    return pg_loss, loss_masks, metrics


def _statistics(trainer: Tensor, engine: Tensor, mask: Tensor) -> dict[str, float]:
    ess = ratio_statistics(trainer, engine, mask)
    return {
        **mismatch_statistics(trainer, engine, mask),
        **ratio_tail(trainer, engine, mask, prefix="rollout_ratio"),
        **{f"rollout_{name}": ess[name] for name in ("ratio/token_ess", "ratio/token_var")},
    }


def log_rollout(
    rollout_id: int,
    args: Any,
    samples: Sequence[Any],
    rollout_extra_metrics: dict[str, Any] | None,
    rollout_time: float,
) -> bool:
    """Add what the engine's record says to the metrics of a rollout, which slime goes on to log.

    Where slime hands over no metrics to add to, they go to the log as a line. Returns False: slime
    logs as ever.
    """
    try:
        batch = batch_of(samples)
    except ConfigError as error:  # an instrument does not stop a run
        logger.warning("rollout %s is not measured: %s", rollout_id, error)
        return False
    if batch is None:
        return False
    found = inspect_batch(batch)
    broken = [f"law {law.check}: {law.reason}" for law in found.laws if law.passed is False]
    metrics = {f"{PREFIX}{name}": value for name, value in found.metrics.items()}
    metrics[f"{PREFIX}replay/broken_laws"] = float(len(broken))
    if broken:
        logger.warning("routes of rollout %s: %s", rollout_id, "; ".join(broken))
    if rollout_extra_metrics is None:
        logger.info("rollout %s: %s", rollout_id, metrics)
    else:
        rollout_extra_metrics.update(metrics)
    folder = os.environ.get(RECORD)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_batch(Path(folder) / f"rollout_{rollout_id}.safetensors", batch)
    return False


def batch_of(samples: Sequence[Any]) -> RecordedBatch | None:
    """The record of some samples: masks, engine's log-probs, routes and versions of weights.

    A sample has `tokens`, `response_length`, `loss_mask` or None, `rollout_log_probs` of its
    response, `rollout_routed_experts` [len(tokens) - 1, L, K] by the position that is read, and
    `weight_versions`. None: no sample has log-probs or routes.

    Raises:
        ConfigError: no token counts, or there are not as many log-probs as tokens.
    """
    samples = [sample for sample in samples if sample.response_length > 0]
    fields: dict[str, Any] = {}
    if samples and all(sample.rollout_log_probs is not None for sample in samples):
        for number, sample in enumerate(samples):
            if len(sample.rollout_log_probs) != sample.response_length:
                raise ConfigError(
                    f"sample {number}: {len(sample.rollout_log_probs)} log-probs of "
                    f"{sample.response_length} response tokens"
                )
        fields["rollout_logprobs"] = _pad([torch.tensor(s.rollout_log_probs) for s in samples])
    if samples and all(_routes(sample) is not None for sample in samples):
        rows = [
            response_rows(
                torch.as_tensor(_routes(s)), len(s.tokens) - s.response_length, s.response_length
            )
            for s in samples
        ]
        fields["routes"] = pad_sequence(rows, batch_first=True, padding_value=-1)
    if not fields:
        return None
    masks = [
        torch.ones(s.response_length) if s.loss_mask is None else torch.tensor(s.loss_mask)
        for s in samples
    ]
    mask = _pad([part.bool() for part in masks])
    versions = [sorted(set(sample.weight_versions), key=_in_order) for sample in samples]
    if all(versions):
        known = sorted({v for own in versions for v in own}, key=_in_order)
        numbers = {name: n for n, name in enumerate(known)}
        ends = [(numbers[own[0]], numbers[own[-1]]) for own in versions]
        fields["versions"] = versions_between(ends, mask)
    return RecordedBatch(source="slime", mask=mask, **fields)


def _in_order(version: str) -> tuple[int, str]:
    """Versions are numbers as text: 9 comes before 10."""
    return (int(version), "") if version.isdigit() else (0, version)


def _routes(sample: Any) -> Any:
    return getattr(sample, "rollout_routed_experts", None)


def _pad(parts: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(parts), batch_first=True)
