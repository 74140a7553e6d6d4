"""Datasets as they are published: columns, messages, numbers, sources; rewards of one's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_rl.config import ConfigError, TaskConfig
from moe_rl.presets import preset
from moe_rl.tasks import Dataset
from moe_rl.training.run import resolve

PUBLISHED = Path(__file__).parent / "published"
GSM8K, AIME, CODE = (str(PUBLISHED / f"{n}.jsonl") for n in ("gsm8k", "aime", "livecodebench"))
TEXT = {"prompt": "1+1=", "answer": "2"}
GOOD = {**TEXT, "q": "a", "a": {"b": "2", "inputs": ["1"], "outputs": ["1"]}}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def rewards(task: Dataset, *completions: str, row: int = 0) -> list[float]:
    problem, count = task.listed()[row].problem, len(completions)
    columns = {name: [value] * count for name, value in problem.columns.items()}
    return task.reward([problem.prompt] * count, completions, **columns)


def test_gsm8k_is_read_by_its_own_columns_and_judged_by_its_final_answer() -> None:
    task = Dataset(dataset=GSM8K, judge="last_number", response_tokens=9)
    assert len(task.listed()) == 3 and task.listed()[1].answer == "1,250"
    assert rewards(task, "1250", "it is 1,250.0 cars", "#### 1250", "125", row=1) == [1, 1, 1, 0]
    pairs = task.demonstrations(np.random.default_rng(0), 20, 0.0)
    assert {text for _, text in pairs} == {row.answer for row in task.rows}
    assert all("####" in text for _, text in pairs)


def test_aime_is_judged_by_value() -> None:
    pytest.importorskip("math_verify", reason="pip install 'moe-rl[math]'")
    task = Dataset(dataset=AIME, judge="math_verify", response_tokens=9)
    assert [row.answer for row in task.listed()] == ["204", "007"]
    assert rewards(task, r"so \boxed{7}", "it is 007", r"\boxed{70}", "", row=1) == [1, 1, 0, 0]


def test_livecodebench_asks_with_its_starter_code_and_runs_the_tests() -> None:
    task = Dataset(dataset=CODE, judge="code", response_tokens=9, program_seconds=20.0)
    assert task.unanswered == f"{CODE}, line 1"
    assert str(task.listed()[1].problem.prompt).endswith("-> List[List[int]]:\n        ")
    good = "for i in range(int(input())): print(2 * int(input()))"
    assert rewards(task, good, good.replace("2", "3")) == [1.0, 0.0]
    run = preset("tiny").replace(task=task.settings)
    with pytest.raises(ConfigError, match=r"line 1: no answer that a cold start could imitate"):
        resolve(run)
    assert resolve(run.replace(sft_steps=0)).task.dataset_sha256 == task.sha256


@pytest.mark.parametrize(
    ("row", "options", "prompt", "answer"),
    [
        ({"prompt": "a", "answer": 204}, {}, "a", "204"),
        ({"prompt": "a", "answer": 0.5}, {}, "a", "0.5"),
        ({"prompt": "a", "answer": 3.0}, {}, "a", "3"),
        ({"problem": "a", "solution": "b", "extra": [1]}, {}, "a", "b"),
        ({"q": "a", "a": "b"}, {"prompt_column": "q", "answer_column": "a"}, "a", "b"),
        (  # verl's layout
            {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "b"}},
            {"answer_column": "reward_model.ground_truth"},
            ({"role": "user", "content": "a"},),
            "b",
        ),
        ({**TEXT, "a.b": "c"}, {"answer_column": "a.b"}, "1+1=", "c"),
        (TEXT, {"instruction": "Answer:"}, "1+1=\nAnswer:", "2"),
        (TEXT, {"chat": True}, ({"role": "user", "content": "1+1="},), "2"),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
            | {"answer": "2"},
            {"instruction": "i", "chat": True},
            ({"role": "system", "content": "s"}, {"role": "user", "content": "u\ni"}),
            "2",
        ),
    ],
)
def test_columns_numbers_and_messages(
    row: dict[str, Any], options: dict[str, Any], prompt: Any, answer: str, tmp_path: Path
) -> None:
    (found,) = Dataset(dataset=write(tmp_path, row), **options).listed()
    assert (found.problem.prompt, found.answer) == (prompt, answer)
    assert found.problem.columns["answer"] == answer
    assert not {"prompt", "completion"} & found.problem.columns.keys()


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"ask": "a", "answer": "b"}, {}, "prompt: no column 'prompt'; the row has ask, answer; "),
        (TEXT, {"prompt_column": "q"}, "prompt: no column 'q'.*name one as prompt_column"),
        (TEXT, {"answer_column": "a.b"}, "answer: no column 'a.b'"),
        ({"prompt": [], "answer": "b"}, {}, r"prompt: \[\] is neither"),
        ({"prompt": [{"role": "user"}], "answer": "b"}, {}, "prompt: .* is neither a text nor"),
        ({"prompt": "a", "answer": None}, {}, "answer: None is no text and no finite number"),
        ({"prompt": "a", "answer": "no"}, {"judge": "last_number"}, "answer: .*judge=last_number"),
        (TEXT, {"judge": "code", "answer_column": "a"}, "no tests in a; name their column"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_the_way_out(
    row: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    if "judge" in options:
        options = {"response_tokens": 9} | options
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, line 2: {words}") as refused:
        Dataset(dataset=write(tmp_path, GOOD, row), **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_file_of_another_format_holds_the_same_rows(suffix: str, tmp_path: Path) -> None:
    expected = Dataset(dataset=GSM8K)
    table, path = pd.read_json(GSM8K, lines=True), tmp_path / f"rows.{suffix}"
    table.to_parquet(path) if suffix == "parquet" else table.to_csv(path, index=False)
    found = Dataset(dataset=str(path))
    assert [row.problem for row in found.listed()] == [row.problem for row in expected.listed()]
    assert found.listed()[2].where == f"{path}, row 3"
    assert Dataset(dataset=str(path), dataset_sha256=found.sha256).sha256 == found.sha256
    path.write_bytes(path.read_bytes()[:-20])
    if suffix == "parquet":
        with pytest.raises(ConfigError, match=r"dataset='.*rows.parquet' cannot be loaded"):
            Dataset(dataset=str(path))


def test_a_hub_dataset_is_known_by_its_rows_and_named_where_it_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    asked: list[Any] = []

    def load(source: str, config: str | None, *, split: str) -> Any:
        asked.append((source, config, split))
        return datasets.Dataset.from_json(GSM8K)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"dataset='acme/none': no such file, and as a dataset of"
    ):
        Dataset(dataset="acme/none")
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Dataset(dataset="openai/gsm8k", dataset_config="main", evaluation_dataset="openai/gsm8k")
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert task.listed()[2].where == "openai/gsm8k, row 3" and len(task.held_out()) == 3
    assert task.sha256 == task.held_out_sha256 == task.pinned()["evaluation_sha256"]
    with pytest.raises(ConfigError, match=r"openai/gsm8k.*the file was changed"):
        Dataset(dataset="openai/gsm8k", dataset_sha256="0" * 64)


def test_reasoning_gym_draws_equal_rows_and_judges_by_its_own_score() -> None:
    pytest.importorskip("reasoning_gym", reason="pip install 'moe-rl[reasoning-gym]'")
    options = {
        "dataset": "reasoning-gym:chain_sum",
        "dataset_config": '{"size": 9, "min_terms": 3}',
        "evaluation_dataset": "reasoning-gym:chain_sum",
    }
    task = Dataset(**options)
    assert task.listed() == Dataset(**options).listed() and len(task.listed()) == 18
    assert {str(p.prompt) for p in task.held_out()}.isdisjoint(str(r.prompt) for r in task.rows)
    answer = str(task.listed()[0].answer)
    right, partly, wrong = rewards(task, answer, f"it is {answer}", "no")
    assert right == 1.0 > partly > 0.0 <= wrong < 1.0
    for changes, words in (
        ({"dataset": "reasoning-gym:nothing"}, "Dataset 'nothing' not registered"),
        ({"dataset_config": '{"sizes": 5}'}, "unexpected keyword argument 'sizes'"),
        ({"dataset_config": "{"}, "JSONDecodeError"),
    ):
        with pytest.raises(ConfigError, match=f"cannot be loaded .*{words}"):
            Dataset(**options | changes)


OWN = """
seen = {}

def length(completions, answer, **kwargs):
    seen.update(kwargs, completions=completions)
    return [len(text) / len(right) for text, right in zip(completions, answer)]

def broken(completions, **kwargs):
    return [1 / 0]

def narrow(completions):
    return [0.0]

async def later(completions, **kwargs):
    return [0.0]
"""


def own(folder: Path, function: str, text: str = OWN) -> str:
    (folder / "own.py").write_text(text)
    return f"{folder}/own.py:{function}"


def test_an_own_reward_gets_what_trl_gives_its_reward_functions(tmp_path: Path) -> None:
    file = write(tmp_path, TEXT | {"level": 3}, {"prompt": "2+2=", "answer": "4", "other": "x"})
    task = Dataset(dataset=file, reward=own(tmp_path, "length"), response_tokens=9)
    assert rewards(task, "22", "", "2") == [2.0, 0.0, 1.0]
    assert task.own is not None
    seen = task.own.function.__globals__["seen"]
    assert seen["prompts"] == ["1+1="] * 3 and seen["completions"] == ["22", "", "2"]
    assert (seen["level"], seen["other"]) == ([3] * 3, [None] * 3)
    assert task.pinned()["reward_sha256"] == task.own.sha256


def test_an_own_reward_gets_columns_and_messages_as_they_are(tmp_path: Path) -> None:
    message = {"role": "user", "content": "1+1="}
    file = write(tmp_path, {"prompt": [message], "answer": 42, "solution": "S"})
    reward = own(tmp_path, "look", "def look(prompts, **given):\n    return [[prompts, given]]\n")
    for answer_column in (None, "solution"):
        options = {"answer_column": answer_column, "response_tokens": 9}
        task = Dataset(dataset=file, reward=reward, **options)
        ((prompts, given),) = rewards(task, "x")
        assert prompts == [[message]] and isinstance(prompts[0], list)
        assert (given["answer"], given["solution"]) == ([42], ["S"])


def test_rewards_of_trl_run_as_they_are(tmp_path: Path) -> None:
    """Completions are then messages, as the prompts are."""
    name = "trl.rewards.format_rewards:think_format_reward"
    file = write(tmp_path, TEXT)
    task = Dataset(dataset=file, chat=True, reward=name, response_tokens=9)
    found = rewards(task, "<think>\na\n</think>\nb", "b")
    assert found == [1.0, 0.0]


def test_rows_need_no_answer_for_an_own_reward(tmp_path: Path) -> None:
    text = "def always(prompts, **kwargs):\n    return [0.5] * len(prompts)\n"
    reward = own(tmp_path, "always", text)
    task = Dataset(dataset=write(tmp_path, {"prompt": "a"}), reward=reward, response_tokens=9)
    assert task.listed()[0].answer is None and task.listed()[0].problem.columns == {}
    assert rewards(task, "x", "y") == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own.py:broken", "own.py, line 9: ZeroDivisionError: division by zero; correct the file"),
        ("own.py:narrow", r"its arguments are \(completions\), got an unexpected keyword"),
        ("own.py:later", "a coroutine, which is not awaited"),
        ("own.py:lenght", "no function 'lenght'; did you mean 'length'"),
        ("none.py:length", "cannot be read .No such file"),
        ("no_such_module:f", "no module 'no_such_module' with a source file"),
        ("own.py", "no function; give FILE.py:FUNCTION"),
    ],
)
def test_a_bad_reward_is_one_line(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own(tmp_path, "length")
    with pytest.raises(ConfigError, match=words) as refused:
        task = Dataset(dataset=write(tmp_path, TEXT), reward=name, response_tokens=9)
        rewards(task, "a")
    assert str(refused.value).startswith(f"reward={name!r}: ") and "\n" not in str(refused.value)


def test_a_changed_reward_is_not_resumed(tmp_path: Path) -> None:
    options = {"dataset": write(tmp_path, TEXT), "response_tokens": 9}
    config = preset("tiny").replace(
        task=TaskConfig(task="dataset", reward=own(tmp_path, "length"), **options)
    )
    pinned = resolve(config)
    assert resolve(pinned) == pinned
    own(tmp_path, "length", OWN + "\n")
    with pytest.raises(ConfigError, match=r"config has reward_sha256=\w+: the file was changed"):
        resolve(pinned)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"judge": "last_number"}, "judge=last_number: a response holds more than an answer; give"),
        ({"reward": "a.py:f"}, "reward='a.py:f': a response holds more"),
        ({"reward": "a.py:f", "judge": "exact"}, "your own reward takes the judge's place"),
        ({"reward_sha256": "0" * 64}, "no file to check; give one as reward"),
        ({"program_seconds": 3.0}, "program_seconds=3.0 with judge=None: no program is run"),
        ({"evaluation_split": "test"}, "evaluation_split='test': nothing held out"),
    ],
)
def test_options_that_exclude_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TaskConfig(task="dataset", dataset="x", **options)
