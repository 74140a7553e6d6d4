"""The policy: a transformers MoE causal LM, its tokenizer, and the one forward pass RL needs.

The prompts of a group are read once: their key-value cache is repeated for the G responses, with
gradients, which halves the tokens of a forward pass when prompt and response are as long.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.experts import choose_experts
from moe_rl.fused_layers import new_cache, use_fused_layers
from moe_rl.kernels import token_logprobs
from moe_rl.rollout.batch import RolloutBatch, full_record
from moe_rl.rollout.noise import NoiseDraw, RouterNoise
from moe_rl.routing import find_routers, record_routing, replay_routing, router_noise
from moe_rl.tokenizer import character_tokenizer


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How one forward pass treats routing, and what it should bring back."""

    replay: Tensor | None = None
    """int16 [B, Sp + T, L, K] expert choices to replay; None: live routing."""
    record: bool = True
    """Bring back the live expert choices."""
    scores: bool = False
    """Bring back the router logits."""
    entropy: bool = False
    """Bring back the entropy of each predicted distribution."""
    noise: RouterNoise | None = None
    """Noise on the choice of experts."""


@dataclass(frozen=True, kw_only=True)
class PassOutput:
    """Result of `Policy.response_pass`; tensors over the T response tokens of B sequences."""

    logprobs: Tensor
    """float32 [B, T]; meaningless where the response mask is False."""
    entropy: Tensor | None
    """float32 [B, T] in nats, no gradient."""
    routed_experts: Tensor | None
    """int16 [B, Sp + T, L, K]: the live choices, also while replaying; the last row is -1."""
    router_logits: Tensor | None
    """float32 [B, T, L, E] where each response token is predicted."""

    @classmethod
    def concatenate(cls, outputs: list["PassOutput"]) -> "PassOutput":
        """The outputs of consecutive parts of a batch as one."""
        if len(outputs) == 1:
            return outputs[0]
        parts: dict[str, Tensor | None] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(output, field.name) for output in outputs]
            parts[field.name] = None if values[0] is None else torch.cat(values)
        return cls(**parts)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A causal LM with routers, its tokenizer, and the reasons for its backends."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    experts: str
    fused: tuple[str, ...]
    temperature: float = 1.0
    share_prompts: bool = True

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether this pass will recompute activations: transformers does so in training mode."""
        return self.model.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        )

    @property
    def pad_id(self) -> int:
        """Token that fills up short rows."""
        return int(self.tokenizer.pad_token_id)

    @property
    def eos_id(self) -> int:
        """Token that ends a response."""
        return int(self.tokenizer.eos_token_id)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.model.device

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask: int64 [P, Sp], bool [P, Sp]."""
        encoded = self.tokenizer(
            prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].bool().to(
            self.device
        )

    def decode(self, response_ids: Tensor) -> list[str]:
        """Text of each response, without padding and end of sequence."""
        return self.tokenizer.batch_decode(response_ids, skip_special_tokens=True)

    def read_prompts(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Cache]:
        """Hidden states [P, Sp, H] and the key-value cache of the prompts."""
        cache = new_cache(self.model)
        padded = not bool(prompt_mask.all())
        positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0) if padded else None
        output = self.model.base_model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long() if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, cache

    def read_on(self, ids: Tensor, cache: Cache, prompt_mask: Tensor, group_size: int) -> Tensor:
        """Hidden states [B, s, H] of the next s tokens of every response."""
        mask = positions = None
        if not bool(prompt_mask.all()):
            start = cache.get_seq_length() - prompt_mask.shape[1]
            steps = torch.arange(start, start + ids.shape[1], device=ids.device)
            rows = prompt_mask.repeat_interleave(group_size, dim=0)
            positions = rows.sum(1, keepdim=True) + steps
            mask = torch.nn.functional.pad(rows.long(), (0, start + ids.shape[1]), value=1)
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 next-token logits at the sampling temperature: [..., H] -> [..., V]."""
        return self.model.get_output_embeddings()(hidden).float() / self.temperature

    def response_pass(self, batch: RolloutBatch, options: Pass) -> PassOutput:
        """Log-probs of the response tokens under the current weights, and what routing did.

        Gradients flow where grad mode is on; `options.replay` must then enclose the backward pass
        only when gradient checkpointing is on (see `moe_rl.routing`).
        """
        shared = self.share_prompts and not self.gradient_checkpointing
        hidden, routes, scores = (self._shared if shared else self._whole)(batch, options)
        head = self.model.get_output_embeddings()
        logprobs, *entropy = _as_tuple(
            token_logprobs(
                hidden,
                head.weight,
                batch.response_ids,
                bias=head.bias,
                temperature=self.temperature,
                ignore_index=None,  # what counts is the caller's mask to say
                entropy=options.entropy,
            )
        )
        return PassOutput(
            logprobs=logprobs,
            entropy=entropy[0].detach() if entropy else None,
            routed_experts=routes,
            router_logits=scores,
        )

    def _shared(
        self, batch: RolloutBatch, options: Pass
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Prompts read once per group. Returns hidden [B, T, H], routes, router logits."""
        group, prompt_length = batch.group_size, batch.prompt_ids.shape[1]
        noise = options.noise
        replay_prompts = replay_responses = None
        if options.replay is not None:
            replay_prompts = options.replay[::group, :prompt_length]
            replay_responses = options.replay[:, prompt_length:-1]
        with self.routing(
            options, replay_prompts, noise.for_prompts() if noise else None
        ) as seen_prompts:
            prompt_hidden, cache = self.read_prompts(batch.prompt_ids, batch.prompt_mask)
        cache.batch_repeat_interleave(group)
        first = prompt_hidden[:, -1:].repeat_interleave(group, dim=0)
        if batch.response_ids.shape[1] == 1:
            hidden, seen = first, None
        else:
            with self.routing(
                options, replay_responses, noise.for_responses() if noise else None
            ) as seen:
                rest = self.read_on(batch.response_ids[:, :-1], cache, batch.prompt_mask, group)
            hidden = torch.cat([first, rest], dim=1)
        routes = scores = None
        if options.record:
            prompt_routes = _live(seen_prompts)
            responses = _live(seen) if seen is not None else prompt_routes[:, :0]
            routes = full_record(prompt_routes, responses, group)
        if options.scores:
            last = seen_prompts.router_logits[:, -1:].repeat_interleave(group, dim=0)
            scores = last if seen is None else torch.cat([last, seen.router_logits], dim=1)
        return hidden, routes, scores

    def _whole(
        self, batch: RolloutBatch, options: Pass
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Every sequence read from its first token: for gradient checkpointing (no cache then)."""
        group, prompt_length = batch.group_size, batch.prompt_ids.shape[1]
        prompt_mask = batch.prompt_mask.repeat_interleave(group, dim=0)
        ids = torch.cat(
            [batch.prompt_ids.repeat_interleave(group, dim=0), batch.response_ids[:, :-1]], dim=1
        )
        mask = torch.nn.functional.pad(prompt_mask, (0, ids.shape[1] - prompt_length), value=True)
        replay = None if options.replay is None else options.replay[:, :-1]
        noise = options.noise.for_sequences(prompt_length) if options.noise else None
        with self.routing(options, replay, noise) as seen:
            hidden = self.model.base_model(
                input_ids=ids,
                attention_mask=None if bool(mask.all()) else mask.long(),
                position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
        routes = scores = None
        if options.record:
            live = _live(seen)
            routes = torch.cat([live, torch.full_like(live[:, :1], -1)], dim=1)
        if options.scores:
            scores = seen.router_logits[:, prompt_length - 1 :]
        return hidden[:, prompt_length - 1 :], routes, scores

    @contextlib.contextmanager
    def routing(
        self, options: Pass, replay: Tensor | None, noise: NoiseDraw | None
    ) -> Iterator[Any]:
        """Record, replay and noise around one call of the model, as `options` asks."""
        with contextlib.ExitStack() as stack:
            if noise is not None:
                stack.enter_context(router_noise(self.model, noise))
            if replay is not None:
                yield stack.enter_context(
                    replay_routing(self.model, replay, scores=options.scores, validate=False)
                )
            elif options.record or options.scores:
                yield stack.enter_context(record_routing(self.model, scores=options.scores))
            else:
                yield None


def _as_tuple(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


def _live(seen: Any) -> Tensor:
    """The live choices that a record or a replay context saw."""
    live = getattr(seen, "live_routed_experts", None)
    return seen.routed_experts if live is None else live


# Small checkpoints load at once; the library's bars would break our one line a step.
transformers.utils.logging.disable_progress_bar()


def build_policy(
    config: ModelConfig,
    alphabet: str,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    fuse: bool = True,
) -> Policy:
    """A policy from `config`: built small with seeded weights, or loaded from `config.checkpoint`.

    Args:
        config: sizes, or the folder of a checkpoint.
        alphabet: characters of the task; a loaded tokenizer must know them.
        seed: seed of the initial weights of a built model.
        temperature: log-probs and samples are taken at this temperature.
        fuse: on a CPU, swap in the fused layers; False leaves transformers' own.

    Raises:
        ConfigError: no such folder, no MoE, no tokenizer, an unusable device or experts backend.
    """
    device = resolve_device(config.device)
    dtype = getattr(torch, config.dtype)
    if config.checkpoint is None:
        tokenizer: PreTrainedTokenizerBase = character_tokenizer(alphabet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = Qwen3MoeForCausalLM(_qwen3_moe_config(config, len(tokenizer)))
    else:
        model, tokenizer = _load(config.checkpoint, alphabet)
    model = model.to(device=device, dtype=dtype).eval()
    if getattr(model.config, "final_logit_softcapping", None):
        raise ConfigError(
            f"{config.checkpoint}: models that softcap their logits are not supported"
        )
    choice = choose_experts(device, config.experts_implementation)
    model.set_experts_implementation(choice.name)
    fused = tuple(use_fused_layers(model)) if fuse and _can_fuse(device, dtype) else ()
    return Policy(
        model=model,
        tokenizer=tokenizer,
        experts=choice.name,
        fused=fused,
        temperature=temperature,
    )


def _can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """The fused layers sum in the input's type, so they are for full precision on a CPU."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64)


def resolve_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU. An absent CUDA asked for is an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: not a torch device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r}: {torch.cuda.device_count()} CUDA devices are available here; "
            "use cpu or auto"
        )
    return device


def _qwen3_moe_config(config: ModelConfig, vocabulary: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_size,
        moe_intermediate_size=config.expert_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        # Twice the usual 0.02: at width 96 it shortens the cold start, measured.
        initializer_range=0.04,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def _load(folder: str, alphabet: str) -> tuple[Any, PreTrainedTokenizerBase]:
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"checkpoint={folder!r}: no config.json there; give the folder of a Hugging Face model"
        )
    try:
        AutoConfig.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(f"checkpoint={folder!r}: cannot be loaded ({reason})") from error
    find_routers(model)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"checkpoint={folder!r}: its tokenizer has no end-of-sequence token")
    if tokenizer.decode(tokenizer.encode(alphabet, add_special_tokens=False)) != alphabet:
        raise ConfigError(
            f"checkpoint={folder!r}: its tokenizer cannot spell the task's characters {alphabet!r}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
