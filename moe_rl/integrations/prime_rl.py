"""prime-rl: one of our losses with its metrics, as its custom loss.

    [trainer.loss]
    type = "custom"
    import_path = "moe_rl.integrations.prime_rl.loss"

    [trainer.loss.kwargs]
    algorithm = "dual_clip"

prime-rl calls it for each sequence with log-probs of the policy and of the engine that sampled, and
adds up what it returns; the ratio's denominator is therefore the sampling policy. Written against
its `LossInputs` and `LossOutputs` of September 2026.
"""

from typing import Any

import torch

from moe_rl.integrations import NEEDS_MORE
from moe_rl.integrations.loss_metrics import loss_metrics
from moe_rl.losses import find_algorithm, make_inputs, resolve_options

NEEDS = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")


def loss(inputs: Any, algorithm: str = "grpo", **options: float) -> Any:
    """The sum of a sequence's token losses, and its metrics.

    Args:
        inputs: prime-rl's `LossInputs`, 1-D tensors of one sequence.
        algorithm: one of ours, by name.
        options: of the algorithm, such as clip_high=0.3.

    Returns:
        prime-rl's `LossOutputs`.

    Raises:
        ValueError: an algorithm that needs more than prime-rl hands over, or inputs of another
            layout than the one that this was written against.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    missing = [name for name in NEEDS if not hasattr(inputs, name)]
    if missing:
        raise ValueError(
            f"prime_rl: LossInputs has no {', '.join(missing)}; this moe-rl was written for "
            "another version of prime-rl"
        )
    if algorithm in NEEDS_MORE:
        raise ValueError(
            f"algorithm={algorithm!r}: needs {NEEDS_MORE[algorithm]}, which prime-rl does not "
            "hand to a loss; choose another"
        )
    found = find_algorithm(algorithm)
    for name, value in options.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r}: no number; correct trainer.loss.kwargs")
    chosen = resolve_options(algorithm, found, options, or_else="leave them out")
    engine = inputs.inference_logprobs[None]
    advantages, mask = inputs.advantages[None], inputs.loss_mask[None].bool()
    weights = getattr(inputs, "loss_weights", None)

    def summed(logprobs: torch.Tensor) -> torch.Tensor:
        given = make_inputs(logprobs, engine, advantages, mask, rollout_logprobs=engine)
        tokens = found.loss(given, **chosen)
        return (tokens if weights is None else tokens * weights[None])[mask].sum()

    logprobs = inputs.trainer_logprobs[None]
    metrics = loss_metrics(summed, logprobs, engine, advantages, mask)
    device = logprobs.device
    return LossOutputs(
        loss=summed(logprobs),
        metrics={
            f"moe_rl/{name}": torch.tensor(value, device=device) for name, value in metrics.items()
        },
    )
