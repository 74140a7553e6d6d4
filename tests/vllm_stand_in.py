"""A stand-in for the package vllm: the names and fields that our engine uses, over our own policy.

As strict as the documented contract: an unknown option is a TypeError, what was not asked for is
None, and the prefix cache holds the old weights until it is reset.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from moe_rl.batch import RolloutBatch
from moe_rl.config import ModelConfig
from moe_rl.policy.forward import ForwardOptions, response_pass
from moe_rl.policy.policy import Policy, build_policy
from moe_rl.rollout.cached import generate
from moe_rl.runtime.seeding import generator


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    routed_experts: np.ndarray | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_routed_experts: np.ndarray | None = None


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    detokenize: bool = True


def own_draws(seed: int, count: int) -> np.ndarray:
    return generator(seed, "stand_in").random(count)


@dataclass
class Behaviour:
    """What a test says about the engines that are built while it runs."""

    layout: str = "0.22"
    draws: Callable[[int, int, int], np.ndarray] = lambda seed, n, count: np.stack(
        [own_draws(seed + g, count) for g in range(n)]
    )
    """(seed, n, tokens) -> uniforms [n, tokens]."""
    spoil: Callable[[list[RequestOutput]], Any] = lambda outputs: None
    sampled: list[SamplingParams] = field(default_factory=list)
    """Parameters of every request so far."""


def install(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """Put the stand-in where `import vllm` finds it."""
    behaviour = Behaviour()
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)

    def build(model: str, **options: Any) -> LLM:
        return LLM(behaviour, model, **options)

    vars(module).update(LLM=build, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return behaviour


class LLM:
    def __init__(
        self,
        behaviour: Behaviour,
        model: str,
        *,
        dtype: str = "auto",
        enable_return_routed_experts: bool = False,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        skip_tokenizer_init: bool = False,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        assert generation_config == "vllm" and skip_tokenizer_init and dtype == "float32"
        assert 0 < gpu_memory_utilization < 0.9
        self.behaviour, self.folder = behaviour, model
        self.routes, self.processed = enable_return_routed_experts, logprobs_mode
        self.loaded = self.policy = self._load()

    def collective_rpc(self, method: str) -> list[None]:
        assert method == "reload_weights"
        self.loaded = self._load()
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.policy = self.loaded
        return True

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        self.behaviour.sampled += sampling_params
        first = sampling_params[0]
        assert not first.detokenize and first.stop_token_ids == [*self.policy.end_ids]
        policy = dataclasses.replace(self.policy, temperature=first.temperature)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        draws = [self.behaviour.draws(p.seed, p.n, p.max_tokens) for p in sampling_params]
        texts = policy.tokenizer.batch_decode(ids)
        batch = generate(policy, texts, torch.from_numpy(np.concatenate(draws)))
        if self.processed == "raw_logprobs":
            raw = response_pass(
                dataclasses.replace(policy, temperature=1.0), batch, ForwardOptions()
            )
            batch = dataclasses.replace(batch, rollout_logprobs=raw.logprobs.detach())
        outputs = [self._output(i, row, batch, first) for i, row in enumerate(ids)]
        self.behaviour.spoil(outputs)
        return outputs

    def _load(self) -> Policy:
        return build_policy(ModelConfig(checkpoint=self.folder), "")

    def _output(
        self, i: int, ids: list[int], batch: RolloutBatch, params: SamplingParams
    ) -> RequestOutput:
        rows = [self._row(i * params.n + g, len(ids), batch) for g in range(params.n)]
        outputs = [
            self._completion(g, i * params.n + g, row, len(ids), batch, params)
            for g, row in enumerate(rows)
        ]
        output = RequestOutput(str(i), None, ids, outputs)
        if self.routes and self.behaviour.layout == "0.21":
            output.prompt_routed_experts = rows[0][: len(ids)].astype(np.int16)
            output.prompt_routed_experts[:-1] = -1  # a cached prefix was not run again
        return output

    def _row(self, b: int, prompt: int, batch: RolloutBatch) -> np.ndarray:
        """Routes [S, L, K] of one sequence without its padding, 0 at the last, unfed token."""
        width, length = batch.prompt_ids.shape[1], int(batch.response_mask[b].sum())
        row = batch.routed_experts[b, width - prompt : width + length].numpy().copy()
        row[-1] = 0
        return row

    def _completion(
        self,
        index: int,
        b: int,
        row: np.ndarray,
        prompt: int,
        batch: RolloutBatch,
        params: SamplingParams,
    ) -> CompletionOutput:
        kept = batch.response_mask[b]
        tokens = batch.response_ids[b, kept].tolist()
        values = batch.rollout_logprobs[b, kept].tolist()
        truncated = bool(batch.truncated[b])
        routes = {
            "0.14": lambda: row[:-1].astype(np.int32),
            "0.21": lambda: row[prompt:].astype(np.int16),
            "0.22": lambda: row[:-1].astype(np.int16),
        }[self.behaviour.layout]()
        return CompletionOutput(
            index=index,
            text="",
            token_ids=tokens,
            cumulative_logprob=None,
            logprobs=None
            if params.logprobs is None
            else [{t: Logprob(v)} for t, v in zip(tokens, values, strict=True)],
            routed_experts=routes if self.routes else None,
            finish_reason="length" if truncated else "stop",
            stop_reason=None if truncated else tokens[-1],
        )
