"""The dataset task: a file read whole or not at all, its rewards, and its place in a run's name."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.config import ConfigError, ModelConfig, RunConfig, TaskConfig
from moe_rl.policy.build import build_policy
from moe_rl.policy.fit import check_fit
from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.presets import preset
from moe_rl.tasks import Dataset, make_task, task_of
from moe_rl.training.cold_start import cold_start_hash, starting_policy
from moe_rl.training.run import resolve, train

ROWS = [("1+1=", "2"), ("10+10=", "20"), ("say nothing", ""), ("two\nlines: ", " a .\n\nb")]


def write(path: Path, rows: list[tuple[str, str]], ending: str = "\n") -> str:
    lines = [json.dumps({"prompt": p, "answer": a}) for p, a in rows]
    path.write_text("".join(line + ending for line in lines), newline="")
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", ROWS)


def config(file: str, **changes: Any) -> RunConfig:
    return preset("tiny").replace(task="dataset", dataset=file, sft_steps=2, steps=1, **changes)


def test_the_task_is_what_the_file_says(file: str) -> None:
    task = make_task("dataset", dataset=file)
    assert {(p.prompt, p.columns["answer"]) for p in task.prompts(rng(), 100)} == set(ROWS)
    assert sorted(task.alphabet) == sorted(set("".join(p + a for p, a in ROWS)))
    assert task.max_prompt_tokens == len("say nothing") and task.max_response_tokens == 7 + 1
    assert Dataset(dataset=file, response_tokens=50).max_response_tokens == 50
    assert [row.where for row in task.listed()] == [f"{file}, line {n}" for n in (1, 2, 3, 4)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_equal_generators_give_equal_problems_and_demonstrations(file: str) -> None:
    task = Dataset(dataset=file)
    assert task.prompts(rng(7), 20) == task.prompts(rng(7), 20) != task.prompts(rng(8), 20)
    pairs = task.demonstrations(rng(7), 20, 0.5)
    assert pairs == task.demonstrations(rng(7), 20, 0.5)
    assert [prompt for prompt, _ in pairs] == [p.prompt for p in task.prompts(rng(7), 20)]


def test_a_slip_is_one_other_character_as_often_as_asked(file: str) -> None:
    task, count = Dataset(dataset=file), 4000
    answers = dict(ROWS)
    for slip, expected in ((0.0, 0.0), (0.3, 0.3 * 3 / 4), (1.0, 3 / 4)):  # one answer is empty
        wrong = 0
        for prompt, text in task.demonstrations(rng(1), count, slip):
            assert len(text) == len(answers[prompt]) and set(text) <= set(task.alphabet)
            differing = sum(a != b for a, b in zip(text, answers[prompt], strict=True))
            assert differing <= 1 and (slip < 1.0 or differing == bool(text))
            wrong += differing
        assert wrong / count == pytest.approx(expected, abs=0.03)


@given(text=st.text(max_size=8))
def test_a_completion_is_right_if_it_is_the_answer_between_spaces(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    task = Dataset(dataset=write(folder / "rows.jsonl", ROWS))
    completions = [text, "2", " 2\n", "2 2", "", "\u0662"]
    found = task.reward(["?"] * 6, completions, answer=["2"] * 6, other=[None] * 6)
    assert found == [float(text.strip() == "2"), 1.0, 1.0, 0.0, 0.0, 0.0]
    assert task.reward(["?"], [text], answer=[f" {text} "]) == [1.0]


def test_a_file_of_one_character_has_nothing_to_slip_to(tmp_path: Path) -> None:
    task = Dataset(dataset=write(tmp_path / "rows.jsonl", [("a", "a")]))
    assert task.demonstrations(rng(), 3, 1.0) == [("a", "a")] * 3


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_ends_of_any_system_and_a_last_line_without_one(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, ROWS, ending)
    path.write_bytes(path.read_bytes().removesuffix(ending.encode()))
    assert len(Dataset(dataset=str(path)).listed()) == len(ROWS)


def test_the_last_line_is_read_before_the_first_is_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, ROWS * 1000)
    with path.open("a") as opened:
        opened.write('{"prompt": "cut o')
    with pytest.raises(
        ConfigError, match=rf"rows\.jsonl, line {len(ROWS) * 1000 + 1}: Invalid JSON"
    ):
        Dataset(dataset=str(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\n" + json.dumps(ROWS[0]).encode(), "Invalid JSON"),
        (b'{"prompt": "1+1=", "answer": "2"', "Invalid JSON"),
        (b'{"prompt": "\xff", "answer": "2"}', "Invalid JSON"),
        (b'["1+1=", "2"]', r"\[.* is no object"),
        (b'{"prompt": "1+1="}', "answer: no column 'answer'; the row has prompt"),
        (b'{"prompt": "1+1=", "answer": [2]}', "answer: .*is no text and no finite number"),
        (b'{"prompt": "1+1=", "answer": true}', "answer: True is no text and no finite number"),
        (b'{"prompt": "1+1=", "answer": NaN}', "answer: nan is no text and no finite number"),
        (b'{"prompt": "", "answer": "2"}', "prompt: '' is neither a text nor a list"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, ROWS[:2])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, line 3: {words}"):
        Dataset(dataset=str(path))


def test_a_file_that_cannot_be_read_or_is_empty_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"dataset='.*': cannot be read"):
            Dataset(dataset=str(path))
    (tmp_path / "empty").write_text("")
    with pytest.raises(ConfigError, match="the file is empty"):
        Dataset(dataset=str(tmp_path / "empty"))


def cold_hash(run: RunConfig) -> str:
    return cold_start_hash(run, task_of(run.task))


def test_a_run_is_known_by_what_its_dataset_holds(file: str, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy.jsonl", ROWS)
    other = write(tmp_path / "other.jsonl", [*ROWS[:-1], ("two\nlines: ", " a .\n\nc")])
    assert resolve(config(file)).task.dataset_sha256 == resolve(config(copy)).task.dataset_sha256
    assert cold_hash(config(file)) == cold_hash(config(copy))
    assert cold_hash(config(file)) != cold_hash(config(other))
    pinned_config = resolve(config(file))
    assert resolve(pinned_config) == pinned_config
    Path(file).write_bytes(Path(other).read_bytes())
    with pytest.raises(ConfigError, match=r"its sha256 is \w{64}, the config has.*Bring it back"):
        resolve(pinned_config)


def test_options_of_a_dataset_do_not_decide_the_cold_starts_of_other_tasks() -> None:
    from moe_rl.training.cold_start import _made_of

    config = preset("tiny")
    task = task_of(config.task)
    made_of = _made_of(config, task)["task"]
    assert made_of == {"task": "running_sum", "digits": 2, "digits_per_token": 1, "numbers": 3}


def test_an_edited_file_does_not_go_on_with_the_old_run(file: str, tmp_path: Path) -> None:
    run, cold = tmp_path / "run", tmp_path / "cold"
    first = config(file, checkpoint_every=1)
    train(first, run, cold_start_cache=cold)
    before = (run / "steps.jsonl").read_bytes()
    (run / "summary.json").unlink()
    write(Path(file), ROWS[:2])
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"holds a run with dataset_sha256="):
            train(first, run, cold_start_cache=cold, resume=resume)
    assert (run / "steps.jsonl").read_bytes() == before
    # Whoever means it writes the new file's sum into the run's config.
    saved = run / "config.json"
    told = json.loads(saved.read_text())
    told["config"]["task"]["dataset_sha256"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    saved.write_text(json.dumps(told))
    train(first, run, cold_start_cache=cold, resume=True)
    assert len((run / "steps.jsonl").read_text().splitlines()) == first.steps
    assert len(list(cold.glob("[!.]*"))) == 1


def test_a_policy_of_the_files_characters_spells_every_row(file: str) -> None:
    policy = build_policy(preset("tiny").model, Dataset(dataset=file).alphabet)
    for text in [text for row in ROWS for text in row]:
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text) and policy.pad_id not in ids
        assert policy.tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([("1" * 1000, "2" * 24)], {}, "line 1: a prompt of 1000 tokens and a response of 25"),
        ([("1", "22")], {"response_tokens": 2}, "line 1: the answer takes 3 tokens.*at most 2"),
        ([("1", "2"), ("1", "<eos>")], {}, "line 2: .* reads the answer '<eos>' back as ''"),
    ],
)
def test_what_the_model_cannot_hold_is_refused_before_a_cold_start(
    rows: list[tuple[str, str]], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    given = config(write(tmp_path / "rows.jsonl", rows), **changes)
    with pytest.raises(ConfigError, match=words):
        starting_policy(given, task_of(given.task), tmp_path / "cold")
    assert not (tmp_path / "cold").exists()


def test_a_drawn_task_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    policy = build_policy(preset("tiny").model, "0123456789=")
    policy.model.config.max_position_embeddings = 33
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    loaded = build_policy(ModelConfig(checkpoint=str(tmp_path)), "0123456789=")
    check_fit(loaded, make_task("running_sum", digits=15))  # 16 + 16 tokens
    too_long = preset("tiny").replace(checkpoint=str(tmp_path), sft_steps=0, digits=16)
    with pytest.raises(ConfigError, match="a prompt of 17 tokens and a response of 17 exceed"):
        starting_policy(too_long, task_of(too_long.task), tmp_path / "cold")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "dataset"}, "task=dataset: no file to read"),
        ({"dataset": "x"}, "dataset='x' with task=running_sum"),
        ({"response_tokens": 3}, "response_tokens=3 with task=running_sum"),
        ({"task": "dataset", "dataset": "x", "response_tokens": 0}, "response_tokens=0"),
        ({"task": "dataset", "dataset": "x", "dataset_sha256": "abc"}, "dataset_sha256='abc'"),
    ],
)
def test_options_that_make_no_dataset_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TaskConfig(**options)


def test_configs_of_before_datasets_load() -> None:
    values = preset("tiny").to_dict()
    for name in ("dataset", "dataset_sha256", "response_tokens"):
        del values["task"][name]
    assert RunConfig.from_dict(values) == preset("tiny")


def test_line_ends_are_tokens_of_their_own() -> None:
    tokenizer = tokenizer_of("a\n .")
    ids = tokenizer("a\n\n .a", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6 and tokenizer.decode(ids) == "a\n\n .a"
