"""Key-value cache of G responses to each of P prompts that keeps every prompt once.

A `DynamicCache` copies a prompt's keys and values G times and grows by concatenation, so decoding
is bound by memory traffic. Here the prompt part stays `[P, kv, Sp, D]`, and the responses' part is
a list of blocks `[P, kv, G, block length, D]` that are written in place and never moved.

Keys are stored with rotary pairs side by side (see `heads`), so only fused attention can read them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

T = TypeVar("T")

# A block's positions, at least: torch multiplies matrices of fewer than 400 multiplications with a
# slow loop, which a query of 24 or more numbers against 17 keys is not.
_BLOCK = 17


class GroupCacheLayer(CacheLayerMixin):
    """One layer's keys and values: shared prompts, and what each response has added."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.group_size = 1
        self.prompt: tuple[Tensor, Tensor] | None = None
        """Keys and values `[P, kv, Sp, D]`; with gradients when they were read with them."""
        self.blocks: list[tuple[Tensor, Tensor]] = []
        """Keys and values `[P, kv, G, block length, D]`; zero where not yet filled."""
        self.response_length = 0
        """Positions that the responses have added so far."""
        self._prepared: tuple[list[Tensor], list[int], Any] | None = None

    def prepared(self, weights: Sequence[Tensor], prepare: Callable[[], T]) -> T:
        """What `prepare` makes of `weights`, made once for as long as nobody writes to them."""
        if any(weight.is_inference() for weight in weights):  # these count no writes
            return prepare()
        versions = [weight._version for weight in weights]
        if (
            self._prepared is None
            or self._prepared[1] != versions
            or any(a is not b for a, b in zip(self._prepared[0], weights, strict=True))
        ):
            self._prepared = (list(weights), versions, prepare())
        value: T = self._prepared[2]
        return value

    def set_prompt(self, keys: Tensor, values: Tensor) -> None:
        """Store the prompts' keys and values `[P, kv, Sp, D]` in an empty cache."""
        self.prompt = (keys, values)
        self.is_initialized = True

    def capacity_for(self, length: int) -> int:
        """Positions of all blocks once `length` more are filled."""
        capacity = sum(keys.shape[3] for keys, _ in self.blocks)
        missing = self.response_length + length - capacity
        return capacity if missing <= 0 else capacity + max(_BLOCK, missing)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add `[P, kv, G, T, D]` to the responses' keys and values."""
        done, length = 0, keys.shape[3]
        while done < length:
            if self.response_length == sum(k.shape[3] for k, _ in self.blocks):
                shape = (*keys.shape[:3], max(_BLOCK, length - done), keys.shape[4])
                self.blocks.append((keys.new_zeros(shape), values.new_zeros(shape)))
            block = self.blocks[-1]
            capacity = block[0].shape[3]
            start = self.response_length - sum(k.shape[3] for k, _ in self.blocks[:-1])
            count = min(length - done, capacity - start)
            for stored, new in zip(block, (keys, values), strict=True):
                stored[:, :, :, start : start + count] = new[:, :, :, done : done + count]
            done += count
            self.response_length += count

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take `[P, kv, G, T, D]` as all that the responses have, without a copy."""
        self.blocks = [(keys, values)]
        self.response_length = keys.shape[3]

    @property
    def sequences(self) -> int:
        """Rows a batch must have: prompts times responses a prompt."""
        return 0 if self.prompt is None else self.prompt[0].shape[0] * self.group_size

    @property
    def prompt_length(self) -> int:
        """Positions of the shared prompts Sp."""
        return 0 if self.prompt is None else self.prompt[0].shape[2]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let every prompt have `repeats` responses, neighbours in the batch. Copies nothing."""
        assert self.response_length == 0 and self.group_size == 1, "repeat once, after the prompts"
        self.group_size = repeats

    def get_seq_length(self) -> int:
        """Positions read so far, prompt and response."""
        return self.prompt_length + self.response_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `query_length` more tokens see, offset of the first key)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: -1."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name that transformers 5.17 has for `get_max_length`."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stock attention calls this and cannot be served."""
        raise NotImplementedError(
            "GroupCache: only fused attention can read it; pass a DynamicCache to this model"
        )


class GroupCache(Cache):
    """`GroupCacheLayer` for every decoder layer; `batch_repeat_interleave(G)` opens the groups."""

    layers: list[GroupCacheLayer]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[GroupCacheLayer() for _ in range(num_layers)])
        self.shared: tuple[tuple[Any, ...], Any] | None = None
        """What all layers of one forward share (rotary tables, masks), and whose it is."""
