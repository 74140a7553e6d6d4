"""The policy: a MoE causal LM of transformers and its tokenizer, and how it reads a group.

The prompts of a group are read once: their key-value cache is repeated for the G responses, with
gradients, which nearly halves the tokens of a forward pass when prompt and response are as long.
Shapes: P prompts, G responses to each, B = P * G, Sp prompt positions, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_rl.cpu import FastPath
from moe_rl.kernels.final_logits import FinalLogits
from moe_rl.policy.tokenizer import encode_prompt, end_ids, read_tokens
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
    def context(self) -> int | None:
        """Tokens that the model can read at once; None: it does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

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
