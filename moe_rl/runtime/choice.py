"""`Choice`: a backend and the reason it was taken, as `moe-rl doctor` prints them."""

from typing import NamedTuple


class Choice(NamedTuple):
    """The name of a backend, as the function that uses it takes it, and why it was taken."""

    name: str
    reason: str
