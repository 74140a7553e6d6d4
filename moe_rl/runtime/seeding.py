"""Randomness as a pure function of (run seed, purpose, step, prompt, sample).

There is no generator state to save: any draw of any step can be repeated from its address, in any
order and on any rank. Built on NumPy's Philox, a counter-based generator (Salmon et al., SC 2011).
"""

import zlib
from collections.abc import Sequence

import numpy as np

_COUNTER_BLOCK = 2**64  # Draws at one address before the lowest counter word spills over.
# Engines take seeds of 63 bits, and the number of the sample is added to this.
_ENGINE_SEEDS = 2**62


def generator(
    seed: int, purpose: str, *, step: int = 0, prompt: int = 0, sample: int = 0
) -> np.random.Generator:
    """The generator at one address, of numbers >= 0.

    `purpose` is what the draw is for ("sample", "prompts", ...); equal CRC-32 alone share draws.
    """
    key = np.array([seed % _COUNTER_BLOCK, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, sample, prompt, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniforms(
    seed: int, purpose: str, *, step: int, prompts: Sequence[int], group_size: int, count: int
) -> np.ndarray:
    """Uniforms in [0, 1) for every sequence: float64 [len(prompts) * group_size, count]."""
    rows = [
        generator(seed, purpose, step=step, prompt=prompt, sample=sample).random(count)
        for prompt in prompts
        for sample in range(group_size)
    ]
    return np.stack(rows)


def request_seed(seed: int, purpose: str, *, step: int, prompt: int) -> int:
    """The seed of one prompt's samples for an engine with randomness of its own, in [0, 2^62).

    Sample g of the prompt takes the seed + g; those of two prompts overlap with a probability that
    can be neglected.
    """
    drawn = generator(seed, f"{purpose}/engine", step=step, prompt=prompt).integers(_ENGINE_SEEDS)
    return int(drawn)
