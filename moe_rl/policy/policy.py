"""The policy: a transformers MoE causal LM built small or loaded, its tokenizer, its backends.

The prompts of a group are read once: their key-value cache is repeated for the G responses, with
gradients, which nearly halves the tokens of a forward pass when prompt and response are as long.
Shapes: P prompts, G responses to each, B = P * G, Sp prompt positions, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.cpu import FastPath
from moe_rl.experts import choose_experts
from moe_rl.kernels.patch import FinalLogits, final_logits
from moe_rl.policy.families import family_config
from moe_rl.policy.folder import as_loaded, find_model, import_transformers, load_model, loading
from moe_rl.policy.probe import check_logits, must_read_whole
from moe_rl.policy.tokenizer import encode_prompt, end_ids, read_tokens, tokenizer_of
from moe_rl.routing import find_routers
from moe_rl.tasks.base import Prompt


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A causal LM with routers and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    experts: str
    """Name of the experts backend."""
    temperature: float = 1.0
    """Log-probs and samples are taken at this temperature."""
    final: FinalLogits = field(default_factory=FinalLogits)
    """What the model does to the logits of its head."""
    reads_whole: bool = False
    """Sequences are read from their first token each time: the model's cache serves no group."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether this pass will recompute activations: transformers does so in training mode."""
        return any(
            module.training and getattr(module, "gradient_checkpointing", False)
            for module in self.model.modules()
        )

    @property
    def pad_id(self) -> int:
        """Token that fills up short rows."""
        return int(self.tokenizer.pad_token_id)

    @property
    def eos_id(self) -> int:
        """Token that a demonstration ends with."""
        return self.end_ids[0]

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """All tokens that end a response."""
        return end_ids(self.tokenizer, self.model.generation_config)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.model.device

    @property
    def backbone(self) -> Any:
        """The model without its head; Llama 4 holds it under another name than it says."""
        inside = self.model.base_model
        if inside is not self.model:
            return inside
        return next(m for m in self.model.children() if isinstance(m, PreTrainedModel))

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through: all, but only K of E experts per layer."""
        named = [*self.model.named_parameters()]
        experts = sum(p.numel() for name, p in named if ".experts." in name)
        router = find_routers(self.model)[0]
        shared = sum(p.numel() for _, p in named) - experts
        return shared + experts * router.top_k // router.num_experts

    def freeze_routers(self) -> None:
        """Keep every router's own weights as they are, and no others."""
        for router in find_routers(self.model):
            for parameter in router.parameters():
                parameter.requires_grad_(False)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask: int64 [P, Sp], bool [P, Sp]."""
        rows = [torch.tensor(encode_prompt(self.tokenizer, prompt)) for prompt in prompts]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=fill, padding_side="left"
            ).to(self.device)
            for values, fill in ((rows, self.pad_id), ([torch.ones_like(r) for r in rows], 0))
        )
        return ids, mask.bool()

    def until_end(self, response_ids: Tensor) -> list[list[int]]:
        """The tokens of each response, its end included and without padding: [B, T] -> B lists."""
        rows = response_ids.tolist()
        ends = [[token in self.end_ids for token in row] for row in rows]
        return [
            row[: end.index(True) + 1] if True in end else row
            for row, end in zip(rows, ends, strict=True)
        ]

    def decode(self, response_ids: Tensor) -> list[str]:
        """Text of each response, without its end and special tokens: [B, T] -> B texts."""
        return [
            read_tokens(self.tokenizer, [token for token in row if token not in self.end_ids])
            for row in self.until_end(response_ids)
        ]

    def read_whole(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, S, H] of sequences from their first token on, without a cache.

        `mask` bool [B, S] is False on padding, which comes first.
        """
        return self.backbone(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state

    def read_prompts(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Cache]:
        """Hidden states [P, Sp, H] and the key-value cache of the prompts."""
        cache = FastPath(self.model).new_cache()
        mask = None if bool(prompt_mask.all()) else prompt_mask
        return self._read(prompt_ids, mask, cache), cache

    def continue_responses(
        self, ids: Tensor, cache: Cache, prompt_mask: Tensor, group_size: int
    ) -> Tensor:
        """Hidden states [B, s, H] of the next s tokens of every response, which join the cache."""
        mask = None
        if not bool(prompt_mask.all()):
            mask = prompt_mask.repeat_interleave(group_size, dim=0)
            read = cache.get_seq_length() + ids.shape[1] - mask.shape[1]
            mask = torch.nn.functional.pad(mask, (0, read), value=True)
        return self._read(ids, mask, cache)

    def _read(self, ids: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Hidden states of `ids`; `mask` also covers the cache, None: nothing is padded."""
        positions = None
        if mask is not None:
            mask = mask.long()
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 next-token logits at the sampling temperature: [..., H] -> [..., V]."""
        head = self.model.get_output_embeddings()
        product = head(hidden.to(head.weight.dtype)).float()  # some families' streams are float32
        return self.final.of_product(product) / self.temperature


def build_policy(
    config: ModelConfig,
    alphabet: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    fuse: bool = True,
    sharded: bool = False,
) -> Policy:
    """A policy from `config`: built small with seeded weights, or loaded from `config.checkpoint`.

    Args:
        config: sizes, or the folder of a checkpoint.
        alphabet: tokens of the tokenizer of a built model.
        seed: of the initial weights of a built model.
        temperature: see `Policy`.
        dtype: in place of the config's, also one that is not trained in.
        fuse: on a CPU, swap in the fused layers; False leaves transformers' own.
        sharded: FSDP2 will shard the model: only what acts through its modules' forwards is used.

    Raises:
        ConfigError: a folder without a model that has routers and a tokenizer, logits that do not
            come from the head, or a device or experts backend that is unusable here; or a model
            that reads padded sequences wrongly (see `must_read_whole`).
    """
    import_transformers()  # no progress bars, neither now nor when the model is saved
    device = resolve_device(config.device)
    dtype = dtype or getattr(torch, config.dtype)
    if config.checkpoint is None:
        tokenizer: PreTrainedTokenizerBase = tokenizer_of(alphabet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(family_config(config, len(tokenizer)))
        model = as_loaded(model, dtype)  # drawn in float32 whatever the dtype
    else:
        model, tokenizer = _load(config.checkpoint, dtype)
    model = model.to(device).eval()
    name = config.family if config.checkpoint is None else f"checkpoint={config.checkpoint!r}"
    with loading(name):
        final = final_logits(model)
    experts = _set_experts(model, device, config.experts_implementation)
    if fuse and not sharded:
        FastPath(model).install()
    policy = Policy(
        model=model, tokenizer=tokenizer, experts=experts, temperature=temperature, final=final
    )
    # The fused layers have a cache of their own, made for groups.
    if config.checkpoint is None or FastPath(model).is_installed():
        return policy
    check_logits(policy, name)
    return replace(policy, reads_whole=must_read_whole(policy, name))


def _set_experts(model: Any, device: torch.device, requested: str) -> str:
    """Give the model its experts backend; returns its name.

    Raises:
        ValueError: see `choose_experts`; or a backend by name for a model that takes none.
    """
    choice = choose_experts(device, requested)
    try:
        model.set_experts_implementation(choice.name)
    except ValueError as error:
        if requested != "auto":
            raise ConfigError(
                f"experts_implementation={requested!r}: {type(model).__name__} computes its "
                "experts by code of its own; use auto"
            ) from error
        return "own"
    return choice.name


def resolve_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU.

    Raises:
        ConfigError: a device that is not available here.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    usable = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in usable:
        raise ConfigError(f"device={name!r}: not available here; use auto, {', '.join(usable)}")
    return torch.device(name)


def _load(folder: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    path, name = find_model(folder), f"checkpoint={folder!r}"
    model = load_model(path, name, tokenizer=True, dtype=dtype)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    try:
        find_routers(model)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise ConfigError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, its model embeds {words}: they do "
            "not belong together; save the model's own tokenizer into the folder"
        )
    ends = end_ids(tokenizer, model.generation_config)
    if not ends:
        raise ConfigError(
            f"{name}: neither its tokenizer nor its generation_config has an end-of-sequence "
            "token, so that no response can end; set eos_token_id in generation_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    return model, tokenizer
