"""Replay check: how a law is stated, and how it is judged."""

from collections.abc import Iterator
from dataclasses import dataclass

Claims = Iterator[tuple[bool | None, str]]
"""A law yields claims (holds, what is wrong if not) one after another; holds None: the law does not
apply, and why. It is not resumed after a claim that does not hold."""


@dataclass(frozen=True, kw_only=True)
class LawResult:
    """The outcome of one law."""

    check: str
    """Name of the law."""
    passed: bool | None
    """None: not applicable."""
    reason: str
    """What is wrong, or why the law does not apply; empty where it holds."""


def judge_law(name: str, claims: Claims) -> LawResult:
    """The first claim that does not hold, or a pass.

    What a model or a tap raises while it is checked is a result about it, not an error of ours.
    """
    try:
        for holds, reason in claims:
            if not holds:
                return LawResult(check=name, passed=holds, reason=reason)
    except (ValueError, RuntimeError) as error:
        return LawResult(check=name, passed=False, reason=f"{type(error).__name__}: {error}")
    return LawResult(check=name, passed=True, reason="")
