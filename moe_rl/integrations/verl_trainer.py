"""verl: a trainer that reads each step's batch as `moe-rl inspect` does, and logs what it finds.

    VERL_USE_EXTERNAL_MODULES=moe_rl.integrations.verl_trainer,moe_rl.integrations.verl_engine
    trainer.v1.trainer_mode=moe_rl_sync                      # "sync", measured
    actor_rollout_ref.rollout.calculate_log_probs=True       # the engine's log-probs
    actor_rollout_ref.rollout.enable_rollout_routing_replay=True   # the engine's routes
    +trainer.moe_rl_record_dir=batches +trainer.moe_rl_record_every=50

It measures trainer against engine over all response tokens of a step, the record of routes and its
laws, and how many weights sampled a sequence; where `verl_engine` has recorded the trainer's own
routes, also how many of its routers differ from the engine's. Every n steps it writes the batch to
a folder for `moe-rl inspect`. Metrics are logged as `moe_rl/NAME`. Rows that verl fills with expert
0 where the engine returned none count as lost. Tested with verl 0.9.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transfer_queue
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from moe_rl.config import ConfigError
from moe_rl.recorded import (
    RecordedBatch,
    inspect_batch,
    response_rows,
    versions_between,
    write_batch,
)
from moe_rl.recorded.findings import findings

PREFIX = "moe_rl/"
FIELDS = ("prompts", "response_mask")
OPTIONAL = {
    "old_log_probs": "old_logprobs",
    "rollout_log_probs": "rollout_logprobs",
    "advantages": "advantages",
    "routed_experts": "routes",
    "trainer_routed_experts": "trainer_routes",
}

logger = logging.getLogger(__name__)


@register_trainer("moe_rl_sync")
class MeasuredTrainer(PPOTrainerSync):
    """verl's synchronous trainer, with our metrics beside its own."""

    def _compute_metrics(
        self, batch: Any, metrics: dict[str, Any], timing_raw: Any, global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        kept = [n for n, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        if not kept:
            return
        fields = fetch(batch.keys, batch.partition_id)
        try:
            recorded = batch_of(fields, [batch.tags[n] for n in kept], kept)
            found = inspect_batch(recorded)
        except ConfigError as error:  # an instrument does not stop a run
            logger.warning("step %s is not measured: %s", global_steps, error)
            return
        metrics.update({f"{PREFIX}{name}": value for name, value in found.metrics.items()})
        for level, words in findings(found):
            if level == "wrong":
                logger.warning("step %s: %s", global_steps, words)
        folder, every = (
            self.config.trainer.get(name) for name in ("moe_rl_record_dir", "moe_rl_record_every")
        )
        if folder and global_steps % (every or 1) == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_batch(Path(folder) / f"step_{global_steps}.safetensors", recorded)


def fetch(keys: Sequence[str], partition: str) -> dict[str, list[Tensor]]:
    """What the queue has of a step: by field, a tensor a sequence."""
    found = {}
    for name in (*FIELDS, *OPTIONAL):
        try:
            data = transfer_queue.kv_batch_get(
                keys=keys, partition_id=partition, select_fields=[name]
            )
        except ValueError:  # no rollout has written it, or an empty answer
            data = {}
        if name in data:
            found[name] = list(data[name].unbind())
        elif name in FIELDS:
            raise ValueError(f"verl: the queue of {partition!r} holds no {name}")
    return found


def batch_of(
    fields: Mapping[str, Sequence[Tensor]],
    tags: Sequence[Mapping[str, Any]],
    kept: Sequence[int] | None = None,
) -> RecordedBatch:
    """A step's batch, of the sequences `kept`.

    Args:
        fields: of each sequence `prompts` [P_i], `response_mask` [T_i], log-probs and advantages
            [T_i], routes [P_i + T_i, L, K] by the position that is read.
        tags: of the kept sequences, with the first and last weights that sampled them.
        kept: numbers of the sequences that are no padding; None: all.
    """
    kept = range(len(fields["prompts"])) if kept is None else kept
    masks = [fields["response_mask"][n].bool().cpu() for n in kept]
    columns: dict[str, Any] = {}
    for name, ours in OPTIONAL.items():
        if name not in fields:
            continue
        rows = [fields[name][n].cpu() for n in kept]
        are_routes = ours in ("routes", "trainer_routes")
        if are_routes:
            rows = [
                response_rows(row, len(fields["prompts"][n]), len(mask))
                for row, n, mask in zip(rows, kept, masks, strict=True)
            ]
        padding = -1 if are_routes else 0
        columns[ours] = pad_sequence(rows, batch_first=True, padding_value=padding)
    notes = _join_layers(columns)
    mask = pad_sequence(masks, batch_first=True)
    if all("min_global_steps" in tag for tag in tags):
        ends = [(int(tag["min_global_steps"]), int(tag["max_global_steps"])) for tag in tags]
        columns["versions"] = versions_between(ends, mask)
    return RecordedBatch(source="verl", mask=mask, notes=notes, **columns)


def _join_layers(columns: dict[str, Any]) -> tuple[str, ...]:
    """Leave dense layers, which vLLM records as zeros, out of routes; in place, returns notes."""
    routes, trainer = columns.get("routes"), columns.get("trainer_routes")
    if routes is None or trainer is None or routes.shape[2:] == trainer.shape[2:]:
        return ()
    routed = (routes > 0).flatten(0, 1).any(0).any(-1)
    if routes[:, :, routed].shape[2:] == trainer.shape[2:]:
        columns["routes"] = routes[:, :, routed]
        return (f"{int((~routed).sum())} layers without a route left out: dense layers",)
    del columns["trainer_routes"]
    return (
        f"routes of the trainer left out: {list(trainer.shape[2:])} layers and experts a token, "
        f"the engine's have {list(routes.shape[2:])}",
    )
