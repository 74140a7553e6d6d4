"""The policy: a transformers MoE causal LM built small or loaded, its tokenizer, its backends.

The prompts of a group are read once: their key-value cache is repeated for the G responses, with
gradients, which nearly halves the tokens of a forward pass when prompt and response are as long.
Shapes: P prompts, G responses to each, B = P * G, Sp prompt positions, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedTokenizerBase

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.cpu import FastPath
from moe_rl.experts import choose_experts
from moe_rl.kernels.patch import FinalLogits, final_logits
from moe_rl.policy.families import family_config
from moe_rl.policy.folder import find_model, import_transformers, load_model, loading
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
    def active_parameters(self) -> int:
        """Parameters that one token passes through: all, but only K of E experts per layer."""
        named = [*self.model.named_parameters()]
        experts = sum(p.numel() for name, p in named if ".experts." in name)
        router = find_routers(self.model)[0]
        shared = sum(p.numel() for _, p in named) - experts
        return shared + experts * router.top_k // router.num_experts

    def freeze_routers(self) -> None:
        """Keep every router's weights as they are."""
        for router in find_routers(self.model):
            router.module.requires_grad_(False)

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
        return self.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 next-token logits at the sampling temperature: [..., H] -> [..., V]."""
        return self.model.get_output_embeddings()(hidden).float() / self.temperature


def build_policy(
    config: ModelConfig,
    alphabet: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    fuse: bool = True,
    sharded: bool = False,
) -> Policy:
    """A policy from `config`: built small with seeded weights, or loaded from `config.checkpoint`.

    Args:
        config: sizes, or the folder of a checkpoint.
        alphabet: tokens of the tokenizer of a built model.
        seed: of the initial weights of a built model.
        temperature: see `Policy`.
        fuse: on a CPU, swap in the fused layers; False leaves transformers' own.
        sharded: FSDP2 will shard the model: only what acts through its modules' forwards is used.

    Raises:
        ConfigError: a folder without a model that has routers and a tokenizer, logits that are more
            than the head's product, or a device or experts backend that is unusable here.
    """
    import_transformers()  # no progress bars, neither now nor when the model is saved
    device = resolve_device(config.device)
    if config.checkpoint is None:
        tokenizer: PreTrainedTokenizerBase = tokenizer_of(alphabet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(family_config(config, len(tokenizer)))
    else:
        model, tokenizer = _load(config.checkpoint)
    model = model.to(device=device, dtype=getattr(torch, config.dtype)).eval()
    name = config.checkpoint or config.family
    with loading(name):
        final = final_logits(model)
    # Training computes log-probs from the head's product alone: it would leave the rest out.
    if final != FinalLogits():
        raise ConfigError(
            f"{name}: its logits are scaled or capped ({final}), which training does not support; "
            "take a model whose logits are those of its head"
        )
    choice = choose_experts(device, config.experts_implementation)
    model.set_experts_implementation(choice.name)
    if fuse and not sharded:
        FastPath(model).install()
    return Policy(model=model, tokenizer=tokenizer, experts=choice.name, temperature=temperature)


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


def _load(folder: str) -> tuple[Any, PreTrainedTokenizerBase]:
    path, name = find_model(folder), f"checkpoint={folder!r}"
    model = load_model(path, name, tokenizer=True)
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
