"""Key-value cache of G responses to each of P prompts that keeps every prompt once.

A `DynamicCache` copies a prompt's keys and values G times and grows by concatenation, so decoding
is bound by memory traffic. Here the prompt part stays `[P, kv heads, Sp, D]`, and the responses'
part is one buffer `[P, kv heads, G, capacity, D]` that is written in place.

Keys are stored with the rotary pairs side by side (see `attention_math`), so only the attention of
`moe_rl.fused_layers` can read them.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Responses shorter than this never make the buffer grow; it doubles when it does.
_FIRST_CAPACITY = 24


class GroupCacheLayer(CacheLayerMixin):
    """One layer's keys and values: shared prompts, and what each response has added."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.group_size = 1
        self.prompt: tuple[Tensor, Tensor] | None = None
        """Keys and values `[P, kv heads, Sp, D]`; with gradients when they were read with them."""
        self._own: tuple[Tensor, Tensor] | None = None
        self._own_length = 0

    def set_prompt(self, keys: Tensor, values: Tensor) -> None:
        """Store the prompts' keys and values `[P, kv heads, Sp, D]` in an empty cache."""
        self.prompt = (keys, values)
        self.is_initialized = True

    def append(self, keys: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Add `[P, kv heads, G, T, D]` to the responses' keys and values.

        Returns the first `width` positions of both, `[P, kv heads, G, width, D]`; those from
        `response_length` on are zero.
        """
        start, end = self._own_length, self._own_length + keys.shape[3]
        if self._own is None or self._own[0].shape[3] < max(width, end):
            self._grow(keys, max(width, end))
        assert self._own is not None
        for buffer, new in zip(self._own, (keys, values), strict=True):
            buffer[:, :, :, start:end] = new
        self._own_length = end
        return self._own[0][:, :, :, :width], self._own[1][:, :, :, :width]

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take `[P, kv heads, G, T, D]` as all that the responses have, without a copy."""
        self._own = (keys, values)
        self._own_length = keys.shape[3]

    def _grow(self, like: Tensor, needed: int) -> None:
        capacity = max(_FIRST_CAPACITY, needed)
        if self._own is not None:
            capacity = max(capacity, 2 * self._own[0].shape[3])
        old = self._own
        shape = (*like.shape[:3], capacity, like.shape[4])
        self._own = (like.new_zeros(shape), like.new_zeros(shape))
        if old is not None:
            for buffer, before in zip(self._own, old, strict=True):
                buffer[:, :, :, : self._own_length] = before[:, :, :, : self._own_length]

    @property
    def sequences(self) -> int:
        """Rows a batch must have: prompts times responses a prompt."""
        return 0 if self.prompt is None else self.prompt[0].shape[0] * self.group_size

    @property
    def prompt_length(self) -> int:
        """Positions of the shared prompts Sp."""
        return 0 if self.prompt is None else self.prompt[0].shape[2]

    @property
    def response_length(self) -> int:
        """Positions that the responses have added so far."""
        return self._own_length

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let every prompt have `repeats` responses, neighbours in the batch. Copies nothing.

        Raises:
            ValueError: responses are under way, or the prompts were repeated before.
        """
        if self._own_length or self.group_size != 1:
            raise ValueError(
                f"the cache holds {self.group_size} responses a prompt, {self._own_length} tokens "
                "each: repeat it once, right after the prompts were read"
            )
        self.group_size = repeats

    def get_seq_length(self) -> int:
        """Positions read so far, prompt and response."""
        return self.prompt_length + self._own_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `query_length` more tokens see, offset of the first key)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: -1."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stock attention calls this and cannot be served: always an error."""
        raise ValueError(
            "a GroupCache serves only attention that use_fused_layers has swapped: pass a "
            "DynamicCache to this model, or let new_cache(model) choose"
        )


class GroupCache(Cache):
    """`GroupCacheLayer` for every decoder layer; `batch_repeat_interleave(G)` opens the groups."""

    layers: list[GroupCacheLayer]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[GroupCacheLayer() for _ in range(num_layers)])
