"""dataset: prompts and answers of rows that others have published, or of your own.

    {"prompt": "capital of France? ", "answer": "Paris"}

Rows come from a file, the hub or reasoning-gym (rows.py), are judged by a named judge (judges.py,
programs.py) or a function of your own (own_reward.py), and are known by their sha256.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from moe_rl.runtime.own_code import OwnFunction
from moe_rl.runtime.strict import ConfigError
from moe_rl.tasks.base import Listed, Problem, Prompt, Task
from moe_rl.tasks.judges import JUDGES, accepts_itself, final_answer
from moe_rl.tasks.own_reward import call_reward, load_reward
from moe_rl.tasks.programs import MEGABYTES, SECONDS, pass_all, read_cases
from moe_rl.tasks.rows import Rows, make_gym, read_rows
from moe_rl.tasks.settings import REASONING_GYM, TaskConfig

_PROMPTS = ("prompt", "question", "problem", "question_content")
_ANSWERS = ("answer", "solution")
# Arguments of TRL's reward functions that are no columns.
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids"}


class Row(NamedTuple):
    """One row: its place, what the policy is asked, and what its reward needs."""

    where: str
    prompt: Prompt
    answer: str | None
    """A text that is right, as far as the row has one."""
    columns: dict[str, Any]


class Dataset(Task):
    """Rows of a dataset, drawn uniformly and with replacement.

    Args:
        options: fields of `TaskConfig`.

    Raises:
        ConfigError: the dataset or the reward cannot be read, or was changed since it was pinned; a
            row lacks its prompt or answer, or has an answer that its judge does not accept. Names
            file and line.
    """

    name: ClassVar[str] = "dataset"

    def __init__(self, **options: Any) -> None:
        self.settings = given = TaskConfig(task="dataset", **options)
        assert given.dataset is not None  # TaskConfig refuses it
        gym = given.dataset.startswith(REASONING_GYM)
        self.judge = given.judge or ("reasoning_gym" if gym and not given.reward else "exact")
        self.rows, self.sha256 = self._read("dataset", "train")
        self.held_out_rows, self.held_out_sha256 = list[Row](), None
        if given.evaluation_dataset is not None:
            self.held_out_rows, self.held_out_sha256 = self._read("evaluation", "test")
        self.own: OwnFunction | None = None
        if given.reward is not None:
            self.own = load_reward(given.reward, given.reward_sha256, self.rows[0].columns)
        else:
            self._check_answers()

    def pinned(self) -> dict[str, Any]:
        """The settings that say what the files held when they were read."""
        return {
            "dataset_sha256": self.sha256,
            "evaluation_sha256": self.held_out_sha256,
            "reward_sha256": self.own and self.own.sha256,
        }

    @cached_property
    def alphabet(self) -> str:
        rows = [*self.rows, *self.held_out_rows]
        return "".join(
            sorted(set().union(*(_text(row.prompt) + (row.answer or "") for row in rows)))
        )

    @property
    def max_prompt_tokens(self) -> int:
        return max(len(_text(row.prompt)) for row in self.rows)

    @cached_property
    def max_response_tokens(self) -> int:
        return self.settings.response_tokens or 1 + max(
            len(row.answer or "") for row in [*self.rows, *self.held_out_rows]
        )

    @property
    def unanswered(self) -> str | None:
        """Place of the first row whose answer no demonstration can show."""
        return next((row.where for row in self.rows if row.answer is None), None)

    def listed(self) -> list[Listed]:
        return [
            Listed(row.where, _problem(row), None if self.own else self._right(row))
            for row in [*self.rows, *self.held_out_rows]
        ]

    def held_out(self) -> list[Problem]:
        return [_problem(row) for row in self.held_out_rows]

    def prompts(self, rng: np.random.Generator, count: int) -> list[Problem]:
        return [_problem(row) for row in self._draw(rng, count)]

    def demonstrations(
        self, rng: np.random.Generator, count: int, slip: float
    ) -> list[tuple[Prompt, str]]:
        """With probability `slip` one character of the answer is another one of the file's.

        The position and the other character are uniform. An empty answer has nothing to slip on,
        and a file of one character nothing to slip to.
        """
        rows = self._draw(rng, count)
        slips = rng.random(count) < slip
        return [
            (
                row.prompt,
                _replace_one(rng, row.answer or "", self.alphabet) if slipped else row.answer or "",
            )
            for row, slipped in zip(rows, slips, strict=True)
        ]

    def reward(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        """What the judge or the user's own function says: of a judge 1.0 for a right completion."""
        if self.own is not None:
            return call_reward(self.own, prompts, completions, **columns)
        answers = columns["answer"]
        if self.judge == "code":
            return pass_all(
                completions,
                answers,
                seconds=self.settings.program_seconds or SECONDS,
                megabytes=self.settings.program_memory or MEGABYTES,
            )
        if self.judge == "reasoning_gym":
            entries = [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
            return [
                float(self._gym.score_answer(text.strip(), entry))
                for text, entry in zip(completions, entries, strict=True)
            ]
        judge = JUDGES[self.judge]
        return [float(judge(*pair)) for pair in zip(completions, answers, strict=True)]

    @cached_property
    def _gym(self) -> Any:
        return make_gym(str(self.settings.dataset), self.settings.dataset_config, "train")

    def _read(self, which: str, split: str) -> tuple[list[Row], str]:
        """The rows of the dataset or of the held-out one, and their sha256."""
        option = "dataset" if which == "dataset" else "evaluation_dataset"
        source, pin = getattr(self.settings, option), getattr(self.settings, f"{which}_sha256")
        found = read_rows(
            source,
            option=option,
            config=self.settings.dataset_config,
            split=getattr(self.settings, f"{which}_split") or split,
        )
        if pin not in (None, found.sha256):
            raise ConfigError(
                f"{option}={source!r}: its sha256 is {found.sha256}, the config has "
                f"{which}_sha256={pin}: the file was changed. Bring it back, or leave "
                f"{which}_sha256 out for another run"
            )
        return self._to_rows(found), found.sha256

    def _to_rows(self, found: Rows) -> list[Row]:
        # JSONL may leave columns out of a row.
        names = dict.fromkeys(name for row in found.rows for name in row)
        rows = []
        for where, row in zip(found.where, found.rows, strict=True):
            prompt = _prompt(self.settings, row, where, code=self.judge == "code")
            columns = {name: row.get(name) for name in names if name not in _RESERVED}
            if self.judge == "code":
                answer = None
                columns["answer"] = read_cases(row, self.settings.answer_column, where)
            else:
                answer = self._answer(row, where)
                if self.settings.reward is None:  # a reward of one's own gets the row as it is
                    columns["answer"] = answer
            rows.append(Row(where, prompt, answer, columns))
        return rows

    def _answer(self, row: Mapping[str, Any], where: str) -> str | None:
        optional = self.settings.reward is not None and self.settings.answer_column is None
        if optional and not any(name in row for name in _ANSWERS):
            return None
        value = _pick(row, self.settings.answer_column, _ANSWERS, "answer", where)
        if isinstance(value, str):
            return value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value):
            return f"{value:.15g}" if isinstance(value, float) else str(value)
        if self.settings.reward is not None:
            return None
        raise ConfigError(
            f"{where}: answer: {value!r:.60} is no text and no finite number; correct the row"
        )

    def _right(self, row: Row) -> str | None:
        """The shortest response known to be right, which may be less than the whole answer."""
        if row.answer is None or self.judge in ("exact", "reasoning_gym"):
            return row.answer
        return final_answer(row.answer)

    def _check_answers(self) -> None:
        """Refuse an answer that the judge would not take for right: nothing could be."""
        for row in [*self.rows, *self.held_out_rows]:
            right = self._right(row)
            if right is None:
                continue
            if self.judge in JUDGES:
                accepted = accepts_itself(self.judge, right)
            else:
                columns = {name: [value] for name, value in row.columns.items()}
                accepted = self.reward([row.prompt], [right], **columns) == [1.0]
            if not accepted:
                raise ConfigError(
                    f"{row.where}: answer: judge={self.judge} does not take {right!r:.60} for "
                    "right itself; correct the row, or choose another judge"
                )

    def _draw(self, rng: np.random.Generator, count: int) -> list[Row]:
        return [self.rows[i] for i in rng.integers(0, len(self.rows), count)]


def read_prompts(options: TaskConfig) -> list[Prompt]:
    """The prompts of a dataset, in its order; answers are not looked at.

    Raises:
        ConfigError: it cannot be read, or a row has no prompt; names file and line.
    """
    assert options.dataset is not None
    found = read_rows(
        options.dataset,
        option="prompts",
        config=options.dataset_config,
        split=options.dataset_split or "train",
    )
    return [
        _prompt(options, row, where) for where, row in zip(found.where, found.rows, strict=True)
    ]


def _prompt(
    settings: TaskConfig, row: Mapping[str, Any], where: str, *, code: bool = False
) -> Prompt:
    """What a row asks, with the instruction behind it, and for `code` the signature to fill."""
    value = _pick(row, settings.prompt_column, _PROMPTS, "prompt", where)
    instruction = "" if settings.instruction is None else f"\n{settings.instruction}"
    if code and row.get("starter_code"):  # LiveCodeBench's, with the signature
        instruction = f"\n{row['starter_code']}{instruction}"
    if isinstance(value, str) and value:
        text = value + instruction
        return ({"role": "user", "content": text},) if settings.chat else text
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise ConfigError(
            f"{where}: prompt: {value!r:.60} is neither a text nor a list of messages "
            '{"role": ..., "content": text}; correct the row'
        )
    last = value[-1] | {"content": value[-1]["content"] + instruction}
    return (*value[:-1], last)


def _problem(row: Row) -> Problem:
    return Problem(prompt=row.prompt, columns=row.columns)


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "".join(m["content"] for m in prompt)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _pick(
    row: Mapping[str, Any], named: str | None, usual: Sequence[str], what: str, where: str
) -> Any:
    """The value of the named column, or of the first usual one; a dot looks into an object."""
    if named is None:
        named = next((name for name in usual if name in row), usual[0])
    value: Any = row
    for part in [named] if named in row else named.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(
                f"{where}: {what}: no column {named!r}; the row has {', '.join(row) or 'none'}; "
                f"name one as {what}_column"
            )
        value = value[part]
    return value


def _replace_one(rng: np.random.Generator, answer: str, alphabet: str) -> str:
    others = len(alphabet) - 1
    if not answer or not others:
        return answer
    position = int(rng.integers(len(answer)))
    other = int(rng.integers(others))
    # Skip the character that is there, so that every slip is a change.
    other += other >= alphabet.index(answer[position])
    return answer[:position] + alphabet[other] + answer[position + 1 :]
