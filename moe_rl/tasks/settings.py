"""The settings of the task. Field docstrings are the `--help` text of the command line."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from moe_rl.runtime.strict import Count, PositiveFloat, Settings, Sha256, strict

JudgeName = Literal["exact", "last_number", "math_verify", "code"]
REASONING_GYM = "reasoning-gym:"
_COMMON = {"task", "digits", "digits_per_token", "numbers"}
_OWN_REWARD = re.compile(r"([^:]+\.py|[^\W\d][\w.]*):[^\W\d]\w*")


@strict
class TaskConfig(Settings):
    """The verifiable-reward task, and the settings of each task."""

    task: Literal["running_sum", "countdown", "dataset"] = "running_sum"
    """running_sum: running sums of digits modulo 10. countdown: combine numbers to reach a target.
    dataset: prompts and answers from a file, the Hugging Face hub or reasoning-gym."""
    digits: Annotated[int, Field(ge=1, le=64)] = 16
    """For running_sum: digits in a prompt, 1 to 64."""
    digits_per_token: Literal[1, 2] = 1
    """For running_sum: digits in a token."""
    numbers: Annotated[int, Field(ge=2, le=4)] = 3
    """For countdown: numbers to combine, 2 to 4."""
    dataset: str | None = None
    """For dataset: JSONL, parquet or CSV file, a hub id such as openai/gsm8k, or
    reasoning-gym:NAME."""
    dataset_config: str | None = None
    """For dataset: configuration of a hub dataset, such as main; for reasoning-gym its settings as
    a JSON object."""
    dataset_split: str | None = None
    """For dataset: split of a hub dataset. Default: train."""
    dataset_sha256: Sha256 | None = None
    """For dataset: SHA-256 that the file or its rows must have. Default: the one it has now."""
    prompt_column: str | None = None
    """For dataset: column of prompts, texts or lists of messages; a dot looks into an object.
    Default: prompt, question, problem or question_content."""
    answer_column: str | None = None
    """For dataset: column of answers. Default: answer or solution; for judge=code
    public_test_cases with private_test_cases, or test_cases."""
    instruction: str | None = None
    """For dataset: line put behind each prompt, such as how to mark the final answer."""
    chat: bool = False
    """For dataset: make each text a user's message and apply the tokenizer's chat template."""
    judge: JudgeName | None = None
    """For dataset: what a right response is. exact: the answer. last_number: its last number is
    that of the answer. math_verify: an equal expression (pip install 'moe-rl[math]'). code: its
    program passes the tests. Default: exact, or what reasoning-gym says."""
    program_seconds: PositiveFloat | None = None
    """For judge=code: CPU time of one test (seconds, > 0), rounded up. Default: 6."""
    program_memory: Count | None = None
    """For judge=code: address space of a program (MiB, >= 1). Default: 1024."""
    reward: str | None = None
    """For dataset: your own reward in place of a judge, FILE.py:FUNCTION or MODULE:FUNCTION with
    the signature of TRL's reward functions."""
    reward_sha256: Sha256 | None = None
    """SHA-256 that the file of your own reward must have. Default: the one it has now."""
    response_tokens: Count | None = None
    """For dataset: largest response length (tokens). Default, for judge=exact: longest answer's
    characters + 1."""
    evaluation_dataset: str | None = None
    """For dataset: held-out rows, named as in dataset, with the same columns and judge."""
    evaluation_split: str | None = None
    """For dataset: split of the held-out rows on the hub. Default: test."""
    evaluation_sha256: Sha256 | None = None
    """SHA-256 that the held-out rows must have. Default: the one they have now."""

    def conflicts(self) -> Iterator[str]:
        if self.task == "dataset" and self.dataset is None:
            yield "task=dataset: no file to read; give one as dataset"
        for name, value in self._given():
            if name not in _COMMON and self.task != "dataset":
                yield f"{name}={value!r} with task={self.task}: needs task=dataset; choose that"
        if self.reward is not None and not _OWN_REWARD.fullmatch(self.reward):
            yield (
                f"reward={self.reward!r}: no function; give FILE.py:FUNCTION or MODULE:FUNCTION, "
                "as in my_reward.py:my_reward"
            )
        if self.reward is not None and self.judge is not None:
            yield (
                f"reward={self.reward!r} with judge={self.judge}: your own reward takes the "
                "judge's place; leave one of them out"
            )
        if self.reward is None and self.reward_sha256 is not None:
            yield f"reward_sha256={self.reward_sha256}: no file to check; give one as reward"
        for name in ("program_seconds", "program_memory"):
            if getattr(self, name) is not None and self.judge != "code":
                yield (
                    f"{name}={getattr(self, name)} with judge={self.judge}: no program is run; "
                    "leave it out, or use judge=code"
                )
        for name in ("evaluation_split", "evaluation_sha256"):
            if getattr(self, name) is not None and self.evaluation_dataset is None:
                yield f"{name}={getattr(self, name)!r}: nothing held out; give evaluation_dataset"
        if self.response_tokens is None and (self.reward or self.judge not in (None, "exact")):
            what = f"judge={self.judge}" if self.judge else f"reward={self.reward!r}"
            yield f"{what}: a response holds more than an answer; give response_tokens"

    def options(self) -> dict[str, Any]:
        """The named task's own options, those of a dataset where they are not the default."""
        if self.task == "running_sum":
            return {"digits": self.digits, "digits_per_token": self.digits_per_token}
        if self.task == "countdown":
            return {"numbers": self.numbers}
        return {name: value for name, value in self._given() if name not in _COMMON}

    def _given(self) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) != field.default:
                yield field.name, value
