"""Which prompts of a rollout a rank samples and trains on.

Prompt n goes to rank n modulo the number of ranks. The consecutive prompts of an update are thereby
spread evenly over all ranks, and those that one rank holds are consecutive in its own batch.
"""

from moe_rl.config import ConfigError, RunConfig


class Share:
    """One rank's prompts of a rollout, which is cut into consecutive updates of equal size.

    Raises:
        ConfigError: there are more ranks than prompts.
    """

    def __init__(self, config: RunConfig, rank: int, size: int) -> None:
        self.rank, self.size, self.num_prompts = rank, size, config.prompts_per_rollout
        self.per_update = self.num_prompts // config.updates_per_rollout
        if self.num_prompts < size:
            raise ConfigError(
                f"prompts_per_rollout={self.num_prompts} on {size} processes: each needs a prompt; "
                f"use at most {self.num_prompts} processes"
            )

    @property
    def prompts(self) -> range:
        """Numbers of the rank's prompts in the rollout."""
        return range(self.rank, self.num_prompts, self.size)

    def of_update(self, update: int) -> slice:
        """The rank's own prompts of an update, as a slice of its batch; may be empty."""
        each = self.per_update
        # The number of the rank's prompts below the first of this update and of the next.
        first, end = (len(range(self.rank, i * each, self.size)) for i in (update, update + 1))
        return slice(first, end)

    def most_of_update(self, update: int) -> int:
        """Number of prompts of an update on the rank that holds the most."""
        return -(-self.per_update // self.size)

    def order(self) -> list[int]:
        """Index of each prompt of the rollout in the joined batches of all ranks."""
        joined = [n for rank in range(self.size) for n in range(rank, self.num_prompts, self.size)]
        return sorted(range(self.num_prompts), key=joined.__getitem__)
