"""dataset: prompts and answers from a file, one JSON object a line.

    {"prompt": "capital of France? ", "answer": "Paris"}

A completion is right if it is the answer, white space at the ends of both aside. The file is read
whole and checked to its last line before anything else happens; it is known by its sha256.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moe_rl.config import ConfigError
from moe_rl.runtime.json_text import parse_json, shown
from moe_rl.tasks.base import Listed, Problem, Task, check_draw, column

KEYS = ("prompt", "answer")


@dataclass(frozen=True, kw_only=True)
class Dataset(Task):
    """Rows of a file, drawn uniformly and with replacement.

    Raises:
        ConfigError: the file cannot be read, a line is no row, or it holds something else than
            `dataset_sha256` says. Names the file and the line.
    """

    name: ClassVar[str] = "dataset"

    dataset: str
    """Path of the file."""

    dataset_sha256: str | None = None
    """What the file must hold, in hexadecimal digits; None: whatever it holds."""

    response_tokens: int | None = None
    """Tokens of a response, end of sequence included. None: the longest answer's characters and
    one, which is what it takes where a token is a character."""

    def __post_init__(self) -> None:
        found = self._content[1]
        if self.dataset_sha256 not in (None, found):
            raise ConfigError(
                f"dataset={self.dataset!r}: its sha256 is {found}, the config has "
                f"dataset_sha256={self.dataset_sha256}: the file was changed. Bring it back, or "
                "leave dataset_sha256 out for another run"
            )

    @property
    def sha256(self) -> str:
        """Of the file, in hexadecimal digits."""
        return self._content[1]

    @property
    def alphabet(self) -> str:
        """Every character of the file's prompts and answers."""
        return "".join(
            sorted({character for row in self._rows for text in row for character in text})
        )

    @property
    def max_prompt_tokens(self) -> int:
        """Characters of the longest prompt."""
        return max(len(prompt) for prompt, _ in self._rows)

    @property
    def max_response_tokens(self) -> int:
        """`response_tokens`, or what the longest answer takes at a token a character."""
        return self.response_tokens or max(len(answer) for _, answer in self._rows) + 1

    def listed(self) -> list[Listed]:
        """Every row with its place in the file."""
        return [
            Listed(where=_place(self.dataset, number), prompt=prompt, answer=answer)
            for number, (prompt, answer) in enumerate(self._rows, start=1)
        ]

    def prompts(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """Rows are uniform."""
        check_draw(count)
        rows = [self._rows[i] for i in self._draw(rng, count)]
        return [Problem(prompt=prompt, columns={"answer": answer}) for prompt, answer in rows]

    def demonstrations(
        self, rng: np.random.Generator, count: int, slip: float
    ) -> list[tuple[str, str]]:
        """With probability `slip` one character of the answer is another one of the file's.

        The position and the other character are uniform. An empty answer has nothing to slip on,
        and a file of one character nothing to slip to.
        """
        check_draw(count, slip)
        rows = [self._rows[i] for i in self._draw(rng, count)]
        slips = rng.random(count) < slip
        alphabet = self.alphabet
        return [
            (prompt, _replace_one(rng, answer, alphabet) if slipped else answer)
            for (prompt, answer), slipped in zip(rows, slips, strict=True)
        ]

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """1.0 where a completion is its problem's `answer`, white space at the ends aside."""
        answers = column(columns, "answer", completions)
        return [
            float(text.strip() == answer.strip())
            for text, answer in zip(completions, answers, strict=True)
        ]

    @property
    def _rows(self) -> list[tuple[str, str]]:
        return self._content[0]

    @cached_property
    def _content(self) -> tuple[list[tuple[str, str]], str]:
        """The rows and the sha256 of one reading: between two the file may change."""
        raw = _read(Path(self.dataset))
        lines = raw.split(b"\n")
        if not lines[-1]:  # what follows the end of the last line
            lines.pop()
        if not lines:
            raise ConfigError(f"dataset={self.dataset!r}: the file is empty; give one row a line")
        rows = [_row(line, _place(self.dataset, n)) for n, line in enumerate(lines, start=1)]
        return rows, hashlib.sha256(raw).hexdigest()

    def _draw(self, rng: np.random.Generator, count: int) -> list[int]:
        indices: list[int] = rng.integers(0, len(self._rows), count).tolist()
        return indices


def _place(path: str, number: int) -> str:
    return f"{path}, line {number}"


def _read(path: Path) -> bytes:
    """All of a file that has an end: pipes and devices may have none, and are not read twice."""
    name = f"dataset={str(path)!r}"
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL or half a surrogate pair, which a JSON config can spell
        raise ConfigError(f"{name}: no path ({error})") from error
    if not is_file:
        raise ConfigError(f"{name}: not a file; give one that has a row a line")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from error


def _row(line: bytes, place: str) -> tuple[str, str]:
    """Prompt and answer of one line, or a ConfigError that begins with its place."""
    try:
        return _checked(parse_json(_text(line)))
    except json.JSONDecodeError as error:
        reason = f"not JSON ({error.msg}, column {error.colno})"
        raise ConfigError(f"{place}: {reason}") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


def _text(line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text, from byte {error.start} of the line") from error
    if not text.strip():
        raise ValueError("empty; take it out")
    return text


def _checked(row: Any) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object of prompt and answer, got {row!r:.60}")
    for key in row:
        if key not in KEYS:
            raise ValueError(f"{shown(key)}: unknown key; a row has {' and '.join(KEYS)}")
    for key in KEYS:
        if key not in row:
            raise ValueError(f"{key} is missing")
        text = row[key]
        if not isinstance(text, str):
            raise ValueError(f"{key}={text!r:.60}: expected a text")
        if "\0" in text:
            raise ValueError(f"{key} has a NUL character")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{key} has half a surrogate pair, which is no character") from error
    if not row["prompt"]:
        raise ValueError("prompt is empty")
    return row["prompt"], row["answer"]


def _replace_one(rng: np.random.Generator, answer: str, alphabet: str) -> str:
    others = len(alphabet) - 1
    if not answer or not others:
        return answer
    position = int(rng.integers(len(answer)))
    other = int(rng.integers(others))
    # The characters but the one that is there, by number.
    other += other >= alphabet.index(answer[position])
    return answer[:position] + alphabet[other] + answer[position + 1 :]
