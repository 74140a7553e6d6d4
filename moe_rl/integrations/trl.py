"""Integrations: routing replay and the instruments inside TRL's GRPOTrainer.

    from moe_rl.integrations.trl import RoutingReplayGRPOTrainer

    trainer = RoutingReplayGRPOTrainer(model, rewards, args, dataset, routing_replay="R2")

or `class MyTrainer(RoutingReplayMixin, MyGRPOTrainer)`. What TRL does stays TRL's: the mixin opens
a routing context around the forwards that TRL makes, and lets the record travel in TRL's batch,
which TRL shuffles and splits row by row. docs/integrations.md has an example, the metrics, limits.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_rl.batch import response_positions
from moe_rl.config import RoutingReplay
from moe_rl.integrations.engine_routes import (
    FIELD,
    PROMPT_FIELD,
    check_record,
    join_prompts,
    lay_out,
)
from moe_rl.integrations.trl_metrics import (
    MicroBatch,
    global_coverage,
    global_routing,
    update_metrics,
)
from moe_rl.integrations.trl_support import require_same_tokens, require_support, require_tested_trl
from moe_rl.metrics.instruments import coverage_sums
from moe_rl.routing import record_routing, replay_routing
from moe_rl.routing.statistics import churn

require_tested_trl()

from trl import GRPOTrainer  # noqa: E402 -- not before the version is known to be tested

# Keys that the mixin adds to TRL's batch; each has a row a sequence.
REPLAY = "routed_experts"
LIVE = "live_routed_experts"
OLD_LOGPROBS = "old_pass_logprobs"


@dataclass(kw_only=True)
class _TrlRollout:
    """What one method of TRL sees of a rollout and another needs."""

    lengths: list[tuple[int, int]]
    """(prompt tokens, response tokens) of each sequence."""
    counted: list[list[int]]
    """Of each response 1 for every token that the loss counts, 0 for those of tools."""
    engine_routes: list[np.ndarray]
    replay: Tensor | None = None
    live: Tensor | None = None
    old_logprobs: Tensor | None = None


class RoutingReplayMixin(GRPOTrainer):
    """Routing replay for GRPOTrainer; stands before it among the bases of a class.

    Training batches only: evaluation is TRL's. The reference model always routes live.

    Args:
        routing_replay: "disabled"; "R2", the choices of the old policy, recorded in its pass over
            the rollout (made here where TRL makes none); "R3", those of the rollout engine, which
            `rollout_func` returns as `routed_experts`, one entry a completion: ids
            `[S or S - 1, L, K]` of prompt and response without padding. In R3 the old policy's
            log-probs are taken under the same routes.
        routing_diagnostics: log `routing/*`, `ratio/*`, `rollout_ratio/*` and `branch/*` of every
            update that has an old policy's pass, over the whole batch of all processes.
        attribution_every: n: every n-th update also logs the split of Var(log w) into
            `ratio/routing_part` and `ratio/weight_part`, for one more forward without gradients.
            With n updates a rollout that is the last of each. 0, or without routing_diagnostics:
            never.

    Raises:
        ValueError: an unknown mode; a model without routers, or one that replay refuses; R3
            without `rollout_func`; a processor of images; an adapter of virtual tokens.
    """

    def __init__(
        self,
        *args: Any,
        routing_replay: RoutingReplay = "disabled",
        routing_diagnostics: bool = True,
        attribution_every: int = 0,
        **kwargs: Any,
    ) -> None:
        self.routing_replay = routing_replay
        self.routing_diagnostics = routing_diagnostics
        self.attribution_every = attribution_every
        self._rollout_under_way: _TrlRollout | None = None
        self._inputs_under_way: dict[str, Any] | None = None
        self._before_backward: MicroBatch | None = None
        self._micro_batches: list[MicroBatch] = []
        self._coverage: list[Tensor] = []
        super().__init__(*args, **kwargs)
        require_support(self)

    def _routing_is_on(self) -> bool:
        on = self.routing_replay != "disabled" or self.routing_diagnostics
        return on and bool(self.model.training)

    # The rollout.

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, extra_fields = generated[0], generated[1], generated[5]
        # TRL would hand them to the reward functions, and to nobody else.
        routes, prompt_routes = extra_fields.pop(FIELD, None), extra_fields.pop(PROMPT_FIELD, None)
        if not self._routing_is_on():
            return generated
        engine_routes: list[np.ndarray] = []
        if self.routing_replay == "R3":
            if routes is None:
                raise ValueError(
                    f"rollout_func: it returned no {FIELD!r}, which routing_replay='R3' replays; "
                    "return one entry per completion, ids [S or S - 1, L, K]"
                )
            engine_routes = join_prompts(routes, prompt_routes)
        lengths = [(len(p), len(c)) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        # Only now: forwards that a rollout_func makes are its own.
        counted = generated[2] or [[1] * response for _, response in lengths]
        self._rollout_under_way = _TrlRollout(
            lengths=lengths, counted=counted, engine_routes=engine_routes
        )
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if self._rollout_under_way is not None:
                output |= self._fields(self._rollout_under_way, output)
        finally:
            self._rollout_under_way = None
        if self.routing_replay == "R3" and LIVE in output:
            differ = _churn(output, output[REPLAY], output[LIVE])
            self._log_metrics(global_routing(self.accelerator, [differ], "mismatch"))
        return output

    def _fields(self, rollout: _TrlRollout, output: dict[str, Any]) -> dict[str, Tensor]:
        """What travels in TRL's batch."""
        tokens = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        kept = output["completion_ids"].shape[1]
        needed = {"disabled": False, "R2": True, "R3": self.routing_diagnostics}
        if rollout.live is None and needed[self.routing_replay]:
            # TRL makes no pass of the old policy where a step is on-policy.
            attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            rows = self.args.per_device_train_batch_size
            with self._without_gradients():
                self._get_per_token_logps_and_entropies(
                    self.model, tokens, attention, kept, batch_size=rows
                )
        fields = {}
        if self.routing_replay == "R2":
            fields[REPLAY] = rollout.live
        elif self.routing_diagnostics:
            fields[LIVE] = rollout.live
        if self.routing_replay == "R3":
            fields[REPLAY] = self._engine_record(rollout, tokens, kept)
        if "old_per_token_logps" not in output and self.routing_diagnostics:
            fields[OLD_LOGPROBS] = rollout.old_logprobs
        return {name: value for name, value in fields.items() if value is not None}

    def _engine_record(self, rollout: _TrlRollout, tokens: Tensor, response_length: int) -> Tensor:
        if rollout.replay is None:
            length = tokens.shape[1]
            prompt = length - response_length
            given = rollout.engine_routes, rollout.lengths
            record = lay_out(*given, prompt_length=prompt, length=length, model=self.model)
            counted = rollout.counted
            check_record(record, tokens, counted, prompt_length=prompt, model=self.model)
            rollout.replay = record.to(tokens.device)
        return rollout.replay

    # Forwards.

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        forward = (model, input_ids, attention_mask, logits_to_keep, *args)
        rollout, inputs = self._rollout_under_way, self._inputs_under_way
        if rollout is not None and rollout.live is None and not self._is_reference(model):
            replay = None
            if self.routing_replay == "R3":
                replay = self._engine_record(rollout, input_ids, logits_to_keep)
            found, rollout.live, _ = self._routed_pass(replay, forward, kwargs)
            rollout.old_logprobs = found[0]
            return found
        if inputs is not None:
            return self._update_pass(inputs, forward, kwargs)
        return self._plain_pass(forward, kwargs)

    def _plain_pass(self, forward: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super()._get_per_token_logps_and_entropies(*forward, **kwargs)

    def _is_reference(self, model: nn.Module) -> bool:
        """Is this TRL's pass of the reference model, and not that of the old policy?"""
        from accelerate.utils import is_peft_model

        if model is self.ref_model:
            return True
        if not is_peft_model(model):
            return False
        from peft.tuners.tuners_utils import BaseTunerLayer

        # The reference of an adapter is the model without it, or with its first state, "ref".
        layer = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)
        return layer is not None and (layer.disable_adapters or "ref" in layer.active_adapters)

    def _routed_pass(
        self, replay: Tensor | None, forward: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor, Tensor | None]:
        """A pass that replays a record if there is one, its live choices, and what was replayed."""
        if replay is None:
            with record_routing(forward[0]) as recorded:
                found = self._plain_pass(forward, kwargs)
            return found, recorded.routed_experts, None
        # Backward comes after the block: a replayed forward is recomputed with its own routes.
        with replay_routing(forward[0], replay, validate=False) as replayed:
            found = self._plain_pass(forward, kwargs)
        return found, replayed.live_routed_experts, replayed.replayed

    def _update_pass(
        self, inputs: dict[str, Any], forward: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        replay = inputs.get(REPLAY)
        old = inputs.get(LIVE, replay)
        if old is None:  # no pass of an old policy: there is nothing to replay or to compare with
            return self._plain_pass(forward, kwargs)
        require_same_tokens(old, forward[1])
        every = self.attribution_every if self.routing_diagnostics else 0
        splits = every > 0 and (self.state.global_step + 1) % every == 0
        # Before the forward in the loss: between it and its backward the model is left alone.
        other = self._other_logprobs(old, replay, forward) if splits else None
        found, new, replayed = self._routed_pass(replay, forward, kwargs)
        if replayed is not None:
            covered = response_positions(replayed, inputs["prompt_ids"].shape[1])
            self._coverage.append(coverage_sums(covered, _response_mask(inputs)))
        if self.routing_diagnostics:
            logprobs, advantages = found[0], inputs["advantages"]
            logprobs.retain_grad()
            own = "old_per_token_logps"  # TRL's, where it made a pass of the old policy
            self._before_backward = MicroBatch(
                logprobs=logprobs,
                old_logprobs=inputs[own if own in inputs else OLD_LOGPROBS],
                rollout_logprobs=inputs.get("sampling_per_token_logps"),
                advantages=advantages.view(len(logprobs), -1).expand_as(logprobs),
                mask=_response_mask(inputs),
                churn=_churn(inputs, old, new),
                other_logprobs=other,
                replayed=replay is not None,
            )
        return found

    def _other_logprobs(
        self, old: Tensor, replay: Tensor | None, forward: tuple[Any, ...]
    ) -> Tensor:
        """Log-probs [b, T] of the current weights: live if the loss replays, else replayed."""
        with self._without_gradients(), contextlib.ExitStack() as contexts:
            if replay is None:
                contexts.enter_context(replay_routing(self.model, old, validate=False))
            logprobs: Tensor = self._plain_pass((self.model, *forward[1:4]), {})[0]
        return logprobs

    @contextlib.contextmanager
    def _without_gradients(self) -> Iterator[None]:
        from trl.models.utils import disable_gradient_checkpointing

        options = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, options):
            yield

    # An update.

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._inputs_under_way = inputs if self._routing_is_on() else None
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._inputs_under_way = None
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        # Only after backward is the gradient known, and only then is the graph let go.
        if self._before_backward is not None:
            self._micro_batches.append(self._before_backward.after_backward())
            self._before_backward = None
        if self._micro_batches and self.accelerator.sync_gradients:
            self._log_metrics(update_metrics(self.accelerator, self._micro_batches))
            self._micro_batches.clear()
        if self._coverage and self.accelerator.sync_gradients:
            self._log_metrics(global_coverage(self.accelerator, self._coverage))
            self._coverage.clear()
        return loss

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)


class RoutingReplayGRPOTrainer(RoutingReplayMixin):
    """TRL's GRPOTrainer with the three arguments of RoutingReplayMixin."""


def _churn(batch: dict[str, Any], before: Tensor, now: Tensor) -> Tensor:
    prompt_length = batch["prompt_ids"].shape[1]
    old, new = (response_positions(routes, prompt_length) for routes in (before, now))
    return churn(old, new, _response_mask(batch))


def _response_mask(batch: dict[str, Any]) -> Tensor:
    """bool [b, T]: the tokens that TRL's loss counts."""
    mask: Tensor = batch["completion_mask"]
    if "tool_mask" in batch:
        mask = mask * batch["tool_mask"]
    return mask.bool()
