"""dataset: prompts and answers from a file, one JSON object a line.

    {"prompt": "capital of France? ", "answer": "Paris"}

A completion is right if it equals the answer, white space at the ends of both aside. The file is
read whole and checked to its last line before anything else happens; its sha256 identifies it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_rl.config import ConfigError
from moe_rl.tasks.base import Listed, Problem, Task


class Row(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    answer: str


@dataclass(frozen=True, kw_only=True)
class Dataset(Task):
    """Rows of a file, drawn uniformly and with replacement.

    Raises:
        ConfigError: the file cannot be read, is empty, has a line that is no row, or has another
            sha256 than `dataset_sha256`. Names the file and the line.
    """

    name: ClassVar[str] = "dataset"

    dataset: str
    """Path of the file."""

    dataset_sha256: str | None = None
    """Expected sha256 of the file, in hexadecimal digits; None: not checked."""

    response_tokens: int | None = None
    """Tokens of a response, end of sequence included. None: characters of the longest answer plus
    one, which is enough where a token is a character."""

    def __post_init__(self) -> None:
        if self.dataset_sha256 not in (None, self.sha256):
            raise ConfigError(
                f"dataset={self.dataset!r}: its sha256 is {self.sha256}, the config has "
                f"dataset_sha256={self.dataset_sha256}: the file was changed. Bring it back, or "
                "leave dataset_sha256 out for another run"
            )

    @property
    def sha256(self) -> str:
        return self._content[1]

    @property
    def alphabet(self) -> str:
        return "".join(sorted(set().union(*(row.prompt + row.answer for row in self._rows))))

    @property
    def max_prompt_tokens(self) -> int:
        return max(len(row.prompt) for row in self._rows)

    @property
    def max_response_tokens(self) -> int:
        return self.response_tokens or max(len(row.answer) for row in self._rows) + 1

    def listed(self) -> list[Listed]:
        return [
            Listed(f"{self.dataset}, line {n}", row.prompt, row.answer)
            for n, row in enumerate(self._rows, start=1)
        ]

    def prompts(self, rng: np.random.Generator, count: int) -> list[Problem]:
        rows = self._draw(rng, count)
        return [Problem(prompt=row.prompt, columns={"answer": row.answer}) for row in rows]

    def demonstrations(
        self, rng: np.random.Generator, count: int, slip: float
    ) -> list[tuple[str, str]]:
        """With probability `slip` one character of the answer is another one of the file's.

        The position and the other character are uniform. An empty answer has nothing to slip on,
        and a file of one character nothing to slip to.
        """
        rows = self._draw(rng, count)
        slips = rng.random(count) < slip
        alphabet = self.alphabet
        return [
            (row.prompt, _replace_one(rng, row.answer, alphabet) if slipped else row.answer)
            for row, slipped in zip(rows, slips, strict=True)
        ]

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """1.0 where a completion is its problem's `answer`, white space at the ends aside."""
        pairs = zip(completions, columns["answer"], strict=True)
        return [float(text.strip() == answer.strip()) for text, answer in pairs]

    @property
    def _rows(self) -> list[Row]:
        return self._content[0]

    @cached_property
    def _content(self) -> tuple[list[Row], str]:
        """The rows and the sha256 of one reading: the file may change between two."""
        try:
            raw = Path(self.dataset).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"dataset={self.dataset!r}: cannot be read ({error.strerror})"
            ) from error
        if not raw:
            raise ConfigError(f"dataset={self.dataset!r}: the file is empty; give one row per line")
        lines = raw.removesuffix(b"\n").split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(Row.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                key = f"{first['loc'][0]}: " if first["loc"] else ""
                raise ConfigError(
                    f"{self.dataset}, line {number}: {key}{first['msg']}; give an object of two "
                    "texts, prompt and answer"
                ) from error
        return rows, hashlib.sha256(raw).hexdigest()

    def _draw(self, rng: np.random.Generator, count: int) -> list[Row]:
        return [self._rows[i] for i in rng.integers(0, len(self._rows), count)]


def _replace_one(rng: np.random.Generator, answer: str, alphabet: str) -> str:
    others = len(alphabet) - 1
    if not answer or not others:
        return answer
    position = int(rng.integers(len(answer)))
    other = int(rng.integers(others))
    # Skip the character that is there, so that every slip is a change.
    other += other >= alphabet.index(answer[position])
    return answer[:position] + alphabet[other] + answer[position + 1 :]
