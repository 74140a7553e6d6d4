"""The policy: a transformers MoE causal LM built small or loaded, its tokenizer, its backends.

The prompts of a group are read once: their key-value cache is repeated for the G responses, with
gradients, which nearly halves the tokens of a forward pass when prompt and response are as long.
Shapes: P prompts, G responses to each, B = P * G, Sp prompt positions, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedTokenizerBase

from moe_rl.config import ConfigError, ModelConfig
from moe_rl.cpu import FastPath
from moe_rl.experts import choose_experts
from moe_rl.kernels.patch import FinalLogits, final_logits
from moe_rl.policy.families import family_config
from moe_rl.policy.folder import import_transformers, load_model, loading
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.routing import find_routers


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
        """Token that ends a response."""
        return int(self.tokenizer.eos_token_id)

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

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask: int64 [P, Sp], bool [P, Sp]."""
        encoded = self.tokenizer(
            prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.device)
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def decode(self, response_ids: Tensor) -> list[str]:
        """Text of each response, without padding and end of sequence."""
        return self.tokenizer.batch_decode(response_ids, skip_special_tokens=True)

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
        alphabet: tokens of the task; a loaded tokenizer must be able to spell them.
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
        model, tokenizer = _load(config.checkpoint, alphabet)
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


def _load(folder: str, alphabet: Sequence[str]) -> tuple[Any, PreTrainedTokenizerBase]:
    path, name = Path(folder), f"checkpoint={folder!r}"
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
    text = "".join(alphabet)
    spelled = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.eos_token_id is None or spelled != text:
        raise ConfigError(
            f"{name}: its tokenizer cannot spell the task's characters {text!r:.80} or has no "
            "end-of-sequence token; take a model whose tokenizer does"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
