"""Judges: whether a response is right, by the answer of its row. One function a judge.

    exact         it is the answer
    last_number   its last number is the answer's
    math_verify   its final expression equals the answer's (huggingface/Math-Verify)

A judge takes the text of a response and that of an answer. `code` is in programs.py.
"""

import logging
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from moe_rl.runtime.extras import import_extra

# A sign that follows a digit or a bracket subtracts. Commas count where they group thousands.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)


# Delimiters of a formula; one dollar, or an escaped one, is money.
_FORMULA = re.compile(r"boxed|\\\(|\\\[|(?<!\\)\$.*(?<!\\)\$", re.S)


def final_answer(text: str) -> str:
    """What a text gives as its answer: all of it, or what stands behind its last `####`.

    GSM8K ends each solution with such a mark (arXiv 2110.14168).
    """
    return text.rpartition("####")[2].strip()


def exact(response: str, answer: str) -> bool:
    """The response is the answer, white space at the ends and forms of characters (NFC) aside."""
    first, second = (unicodedata.normalize("NFC", text).strip() for text in (response, answer))
    return first == second


def last_number(response: str, answer: str) -> bool:
    """The last number of the response equals the last one of the answer; one must be there."""
    found, expected = (_last_number(final_answer(text)) for text in (response, answer))
    return expected is not None and found == expected


def math_verify(response: str, answer: str) -> bool:
    """The response's final expression and the answer's are mathematically equal.

    Behind a mark the final expression needs no delimiters. A mark that no expression follows may
    be a heading: then the whole response is read.
    """
    package = _math_verify()
    candidates = [response]
    if "####" in response:
        final = final_answer(response)
        candidates = [_boxed(final), final, *([] if package.parse(final) else [response])]
    right = _parse_answer(answer)
    return any(package.verify(right, package.parse(text)) for text in candidates)


@lru_cache(maxsize=2**16)
def accepts_itself(judge: str, answer: str) -> bool:
    """Whether a judge takes an answer for right; if it does not, no response can be right."""
    return JUDGES[judge](_boxed(answer) if judge == "math_verify" else answer, answer)


@lru_cache(maxsize=2**14)
def _parse_answer(answer: str) -> list[Any]:
    return list(_math_verify().parse(_boxed(final_answer(answer))))


def _boxed(text: str) -> str:
    r"""A bare formula such as \frac{1}{2} is none to the parser without delimiters."""
    return text if _FORMULA.search(text) else rf"\boxed{{{text}}}"


def _math_verify() -> Any:
    package = import_extra("math_verify", extra="math", option="judge='math_verify'")
    # It tells of each comparison that takes more than its 5 seconds, which counts as wrong.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return package


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


JUDGES: dict[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "last_number": last_number,
    "math_verify": math_verify,
}
