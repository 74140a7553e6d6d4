"""One recorded batch: what its response tokens have, and the names that trainers give to it.

Shapes: B sequences, T positions, L MoE layers, K experts a token. Log-probs, advantages and the
mask of position t belong to the token at t; routes are those at the position where it is predicted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_rl.config import ConfigError
from moe_rl.routing.routed_experts import NO_RECORD

NAMES: dict[str, tuple[str, ...]] = {
    "mask": ("mask", "response_mask", "loss_mask", "token_mask", "token_loss_mask"),
    "logprobs": ("logprobs", "log_probs", "log_prob", "trainer_logprobs", "curr_logprobs"),
    "old_logprobs": ("old_logprobs", "old_log_probs", "prev_logprobs"),
    "rollout_logprobs": (
        *("rollout_logprobs", "rollout_log_probs", "inference_logprobs"),
        *("generation_logprobs", "sampling_logprobs"),
    ),
    "advantages": ("advantages", "advantage"),
    "routes": ("routes", "routed_experts", "rollout_routed_experts"),
    "trainer_routes": ("trainer_routes", "trainer_routed_experts", "old_routes"),
    "versions": ("versions", "weight_versions"),
}
"""Field -> what ours, verl, prime-rl, NeMo-RL, slime and TRL call it."""
LOGPROBS = ("logprobs", "old_logprobs", "rollout_logprobs")


@dataclass(frozen=True, kw_only=True)
class RecordedBatch:
    """What a file holds of one batch; None: it does not."""

    source: str
    """The system that writes such files."""
    mask: Tensor
    """bool [B, T], True at response tokens."""
    logprobs: Tensor | None = None
    """float [B, T], of the policy being trained, nats."""
    old_logprobs: Tensor | None = None
    """float [B, T], of the trainer's pass before the updates."""
    rollout_logprobs: Tensor | None = None
    """float [B, T], of the engine that sampled."""
    advantages: Tensor | None = None
    """float [B, T]."""
    routes: Tensor | None = None
    """int16 [B, T, L, K], the engine's; -1: no record."""
    trainer_routes: Tensor | None = None
    """int16 [B, T, L, K], the trainer's own choice."""
    tokens: Tensor | None = None
    """int64 [B, T], the token that is read where each is predicted; -1: unknown."""
    versions: Tensor | None = None
    """int64 [B, T], number of the weights that sampled each token."""
    notes: tuple[str, ...] = ()
    """What was left out or assumed while reading."""

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together.

        Raises:
            ConfigError: names the field.
        """
        if self.mask.ndim != 2:
            raise ConfigError(
                f"mask: shape {list(self.mask.shape)}, expected [B, T]; record both axes"
            )
        if not bool(self.mask.any()):
            raise ConfigError("mask: no response token in the batch; record one that has some")
        for name in (*LOGPROBS, "advantages", "tokens", "versions"):
            value = getattr(self, name)
            if value is not None and value.shape != self.mask.shape:
                raise ConfigError(
                    f"{name}: shape {list(value.shape)}, the mask has {list(self.mask.shape)}; "
                    "record one value a token"
                )
        for name in ("routes", "trainer_routes"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 4 or value.shape[:2] != self.mask.shape):
                raise ConfigError(
                    f"{name}: shape {list(value.shape)}, expected [B, T, L, K] with B, T = "
                    f"{list(self.mask.shape)}"
                )
        if self.routes is not None and self.trainer_routes is not None:
            ours, theirs = list(self.routes.shape), list(self.trainer_routes.shape)
            if ours != theirs:
                raise ConfigError(
                    f"trainer_routes: shape {theirs}, routes have {ours}; record both of one model"
                )
        if all(getattr(self, name) is None for name in (*LOGPROBS, "routes")):
            raise ConfigError(
                "the batch holds neither log-probs nor routes; record rollout_logprobs, "
                "old_logprobs or routed_experts"
            )

    @property
    def trainer_logprobs(self) -> Tensor | None:
        """What the trainer says of the sampled tokens: before the updates, if it was recorded."""
        return self.logprobs if self.old_logprobs is None else self.old_logprobs


def find_names(names: Mapping[str, object]) -> dict[str, str]:
    """Field -> the name under which `names` has it, for the fields that it has."""
    found = {}
    for field, known in NAMES.items():
        name = next((name for name in known if name in names), None)
        if name is not None:
            found[field] = name
    return found


def where_predicted(routes: Tensor) -> Tensor:
    """Routes [B, S, L, K] where each token is read, moved to where it is predicted: one later."""
    first = torch.full_like(routes[:, :1], NO_RECORD)
    return torch.cat([first, routes[:, :-1]], dim=1)


def versions_between(ends: Sequence[tuple[int, int]], mask: Tensor) -> Tensor:
    """int64 [B, T] where only the first and the last weights of a sequence are known.

    Which tokens are whose is not recorded: the first token gets the first, all others the last.
    """
    versions = torch.tensor([last for _, last in ends])[:, None].repeat(1, mask.shape[1])
    versions[:, 0] = torch.tensor([first for first, _ in ends])
    return versions


def without_fills(routes: Tensor) -> Tensor:
    """Routes [..., L, K] as int16, -1 in rows that were filled with expert 0 on the way.

    verl and slime fill rows that an engine did not return so; no router of several experts a token
    chooses one twice.

    Raises:
        ConfigError: they are no ids, or too large to be.
    """
    if routes.is_floating_point() or routes.is_complex():
        raise ConfigError(f"routes: {routes.dtype}; record expert ids as integers")
    if routes.numel():
        low, high = (int(value) for value in routes.long().aminmax())
        if low < NO_RECORD or high > torch.iinfo(torch.int16).max:
            raise ConfigError(
                f"routes: ids from {low} to {high}; record expert ids, -1 for none, in a signed "
                "type"
            )
    routes = routes.to(torch.int16)
    if routes.shape[-1] == 1:
        return routes
    return routes.masked_fill((routes == 0).flatten(-2).all(-1)[..., None, None], NO_RECORD)


def response_rows(routes: Tensor, prompt_length: int, response_length: int) -> Tensor:
    """Of one sequence, routes where response tokens are predicted: [S, L, K] to int16 [T, L, K].

    Rows that an engine did not return are lacking at the end, or fills: -1, no record.
    """
    rows = without_fills(routes)
    found = rows[prompt_length - 1 : prompt_length - 1 + response_length]
    lacking = response_length - len(found)
    return torch.nn.functional.pad(found, (0, 0, 0, 0, 0, lacking), value=NO_RECORD)


def write_batch(path: Path | str, batch: RecordedBatch) -> None:
    """Write a batch as safetensors, to be read by `read_batch`."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in fields.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, str(path), {"source": batch.source})
