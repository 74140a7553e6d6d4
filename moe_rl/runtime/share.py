"""Which prompts of a rollout a rank samples and trains on.

Prompt n goes to rank n modulo the number of ranks. The consecutive prompts of an update are thereby
spread evenly over all ranks, and those that one rank holds are consecutive in its own batch.
"""

from dataclasses import dataclass

from moe_rl.config import ConfigError, RunConfig


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's prompts of a rollout, which is cut into consecutive updates of equal size."""

    rank: int
    size: int
    num_prompts: int
    updates: int

    @classmethod
    def of(cls, config: RunConfig, rank: int, size: int) -> "Share":
        """The share of one rank of a run.

        Raises:
            ConfigError: there are more ranks than prompts.
        """
        if config.prompts_per_rollout < size:
            raise ConfigError(
                f"prompts_per_rollout={config.prompts_per_rollout} on {size} processes: each needs "
                f"a prompt; use at most {config.prompts_per_rollout} processes"
            )
        return cls(
            rank=rank,
            size=size,
            num_prompts=config.prompts_per_rollout,
            updates=config.updates_per_rollout,
        )

    @property
    def prompts(self) -> range:
        """Numbers of the rank's prompts in the rollout."""
        return range(self.rank, self.num_prompts, self.size)

    def of_update(self, update: int) -> slice:
        """The rank's own prompts of an update, as a slice of its batch; may be empty."""
        each = self.num_prompts // self.updates
        return slice(self._before(update * each), self._before((update + 1) * each))

    def _before(self, prompt: int) -> int:
        """How many of the rank's prompts have a lower number."""
        return len(range(self.rank, prompt, self.size))

    def most_of_update(self, update: int) -> int:
        """Number of prompts of an update on the rank that holds the most."""
        each = self.num_prompts // self.updates
        return -(-each // self.size)

    def order(self) -> list[int]:
        """Index of each prompt of the rollout in the joined batches of all ranks."""
        joined = [n for rank in range(self.size) for n in range(rank, self.num_prompts, self.size)]
        return sorted(range(self.num_prompts), key=joined.__getitem__)
