"""verl: which experts its FSDP engine sends tokens to, old policy against new, in verl's log.

    VERL_USE_EXTERNAL_MODULES=moe_rl.integrations.verl_engine

The pass that recomputes old log-probs returns its routes beside them, and verl keeps them beside
the batch, as it does with R2's of its Megatron engine; each update is held against them. Logged as
`actor/moe_rl/NAME`, each the mean over micro-batches: churn, router and token disagreement, and
router margins. The trainer of `verl_trainer` finds the routes there, and
compares them with those of the rollout engine. Nothing is replayed, and no number of verl changes.

Not measured: critics; sequence parallelism (Ulysses), where a process sees a part of each sequence;
runs that divide by the engine's log-probs (bypass mode), which have no old pass. Tested with verl
0.9.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from moe_rl.integrations.verl import PREFIX
from moe_rl.routing import find_routers, record_routing, statistics

FIELD = "trainer_routed_experts"
"""What the batch calls the old pass's routes: of each sequence int16 [S, L, K]."""

logger = logging.getLogger(__name__)


def measured(step: Callable[..., tuple[Tensor, dict[str, Any]]]) -> Callable[..., Any]:
    """`forward_step` of an FSDP engine that records routes, or compares with recorded ones."""

    @functools.wraps(step)
    def forward_step(
        engine: Any, micro_batch: Any, loss_function: Any, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        # Only the pass of old log-probs asks for the entropy; the reference's must leave no record.
        is_old = forward_only and tensordict_utils.get_non_tensor_data(
            micro_batch, "calculate_entropy", default=False
        )
        is_update = not forward_only and FIELD in micro_batch
        if not (is_old or is_update) or not _is_measured(engine):
            return step(engine, micro_batch, loss_function, forward_only)
        with record_routing(engine.module, router_margins=is_update) as recorded:
            loss, output = step(engine, micro_batch, loss_function, forward_only)
        offsets = micro_batch["input_ids"].offsets().to(loss.device)
        routes = packed(recorded.routed_experts, offsets)
        if is_old:
            output["model_output"][FIELD] = torch.nested.nested_tensor_from_jagged(routes, offsets)
        else:
            assert recorded.router_margins is not None
            found = update_metrics(
                micro_batch[FIELD].values().to(routes.device),
                routes,
                packed(recorded.router_margins, offsets),
                offsets,
                micro_batch["response_mask"],
            )
            output["metrics"] |= {f"{PREFIX}{name}": value for name, value in found.items()}
        return loss, output

    return forward_step


def _is_measured(engine: Any) -> bool:
    """Whether it is an actor of verl's FSDP engine itself, with routers that can be recorded.

    Critics and VeOmni's engine inherit from it; a critic has routes of its own.
    """
    is_actor = type(engine) is FSDPEngineWithLMHead and not engine.use_ulysses_sp
    return is_actor and _has_routers(engine.module)


@functools.cache  # a walk over all modules, and what it says, are not for every micro-batch
def _has_routers(module: nn.Module) -> bool:
    try:
        find_routers(module)
    except ValueError as error:
        logger.warning("routing is not measured: %s", error)
        return False
    return True


def packed(values: Tensor, offsets: Tensor) -> Tensor:
    """Of recorded [B, S, ...] the positions [N, ...] of N tokens, sequence behind sequence.

    Args:
        values: padded on the right, or one row [1, N + padding, ...] as verl packs sequences.
        offsets: int64 [B + 1], where each sequence begins among the N.
    """
    if len(values) == len(offsets) - 1 > 1:
        places = torch.arange(values.shape[1], device=values.device)
        return values[places < offsets.diff()[:, None]]
    return values.flatten(0, 1)[: int(offsets[-1])]


def update_metrics(
    old: Tensor, new: Tensor, margins: Tensor, offsets: Tensor, response_mask: Tensor
) -> dict[str, float]:
    """The routing of an update against the old policy's, by our names; what is NaN is left out.

    verl takes the mean over micro-batches, of which one may have no response token.

    Args:
        old, new: int16 [N, L, K], routes of the N tokens of B sequences.
        margins: float [N, L].
        offsets: int64 [B + 1], where each sequence begins.
        response_mask: nested [B, T_i]; a response is the end of its sequence.
    """
    masks = response_mask.unbind()
    places = [
        torch.arange(end - len(mask) - 1, end - 1)  # each token is predicted one before its own
        for end, mask in zip(offsets[1:].tolist(), masks, strict=True)
    ]
    index = torch.cat(places).to(new.device)
    mask = torch.cat(list(masks)).bool().to(new.device)
    found = statistics.disagreement(statistics.churn(old[index], new[index], mask))
    found["margin"] = float(margins[index][mask].nanmean())
    return {f"routing/{name}": value for name, value in found.items() if not math.isnan(value)}


FSDPEngineWithLMHead.forward_step = measured(FSDPEngineWithLMHead.forward_step)
