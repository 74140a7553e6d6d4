"""JSON of unknown origin: every way in which a text can be broken is a ValueError of one line."""

import json
from collections import Counter
from typing import Any


class _GivenTwiceError(ValueError):
    """One key of an object with two values."""


def parse_json(text: str, *, unique_keys: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: the whole text.
        unique_keys: refuse an object that gives a key twice, of which Python keeps the last.

    Raises:
        json.JSONDecodeError: not JSON; it knows the line.
        ValueError: a key given twice, nesting beyond Python's, or a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object if unique_keys else None)
    except (json.JSONDecodeError, _GivenTwiceError):
        raise
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except ValueError as error:
        # Python converts at most 4300 digits: more would take time in their square.
        raise ValueError("a number has thousands of digits") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _GivenTwiceError(f"{shown(twice)}: given twice in one JSON object; keep one of them")
    return values


def shown(key: str, longest: int = 60) -> str:
    """A key from a file as a message shows it: as it is if it is short and printable."""
    if key.isprintable() and len(key) <= longest:
        return key
    return f"{key!r:.{longest}}"
