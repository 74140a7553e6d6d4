"""What a rollout engine is asked for, and what it must give."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_rl.batch import RolloutBatch
from moe_rl.policy.pass_noise import PassNoise
from moe_rl.tasks.base import Prompt


@dataclass(frozen=True, kw_only=True)
class Request:
    """One rollout to sample: all that decides its tokens besides the weights."""

    prompts: Sequence[Prompt]
    """P texts, or lists of messages."""
    numbers: Sequence[int]
    """Number of each prompt within its rollout step; part of the address of a random draw."""
    seed: int
    """Run seed."""
    purpose: str
    """What the draws are for; different purposes share none (see runtime/seeding.py)."""
    step: int = 0
    """Rollout step; part of the address of a random draw."""
    group_size: int = 1
    """Responses G to each prompt."""
    max_tokens: int
    """Longest response, in tokens."""
    noise: PassNoise | None = None
    """Noise of this pass."""
    router_logits: bool = False
    """Return the router logits as well, if the engine has them."""
    gate_weights: bool = False
    """Return the gate weights of the chosen experts as well."""


class Engine(Protocol):
    """Samples a group of responses to each prompt with the policy's weights as they are now."""

    def sample(self, request: Request) -> RolloutBatch:
        """The G responses to each of P prompts, B = P * G, neighbours within a group.

        Of the batch, `rollout_logprobs` float32 [B, T] are the engine's own log-probs of the tokens
        it sampled, at the policy's temperature; `routed_experts` int16 [B, Sp + T, L, K] are the
        choices it made, -1 where it has no record, which no position that predicts a response
        token may lack.

        Raises:
            FloatingPointError: NaN or inf in what the weights give.
            ValueError: the engine cannot do what is asked, or returned something malformed.
        """
