"""Arms by name and from a file, from the command line to the report."""

import json
from pathlib import Path

import pytest
from runs import Here

from moe_rl.presets import PRESETS, preset

OWN = """def halved(inputs, *, scale=0.5):
    return -scale * inputs.advantages * inputs.logprobs
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting of the quick form is a run of seconds."""
    tiny = preset("tiny").replace(sft_steps=2, steps=1, setting="routing-noise")
    monkeypatch.setitem(PRESETS, "routing-noise", lambda: tiny)


@pytest.mark.usefixtures("small")
def test_a_loss_from_a_file_is_an_arm_from_the_command_to_the_report(
    tmp_path: Path, here: Here
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    command = ["reproduce", "--arms", "grpo", "own.py:halved", "--seeds", "3", "--jobs", "2"]
    done = here(*command, "--out", "study")
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert study["arms"] == ["grpo", "halved"] and study["seeds"] == [3]
    for arm in study["arms"]:
        run = tmp_path / "study" / "runs" / "routing-noise" / arm / "seed3"
        config = json.loads((run / "config.json").read_text())["config"]
        assert (config["loss"], config["arm"]) == (None if arm == "grpo" else "own.py:halved", arm)
        assert (config["loss_sha256"] is None) == (arm == "grpo")
    assert "halved" in (tmp_path / "study" / "report" / "index.html").read_text()
    assert "halved" in done.stdout, "the table on the terminal"
    assert here(*command, "--out", "study", "--dry-run").returncode == 0
    (tmp_path / "own.py").write_text(OWN + "# changed\n")
    changed = here(*command, "--out", "study", "--dry-run")
    assert changed.returncode == 2 and "holds a run with loss_sha256" in changed.stderr


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (["gsop"], "arms='gsop': no such arm; nearest are gspo"),
        (["grpo", "grpo"], "arm grpo with seed 21 is asked for twice: both runs would share"),
        (["own.py:other"], "own.py has no function 'other'; did you mean 'halved'?"),
        (["bad.py:one"], "bad.py:one': returned [] for inputs of shape [6, 5]"),
    ],
)
def test_a_bad_arm_is_refused_before_a_study_is_made(
    arms: list[str], words: str, tmp_path: Path, here: Here
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "bad.py").write_text("def one(inputs):\n    return inputs.logprobs.mean()\n")
    done = here("reproduce", "--arms", *arms)
    assert done.returncode == 2 and words in done.stderr and not done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"own.py", "bad.py"}


def test_arms_prints_a_table_and_cards(here: Here) -> None:
    table = here("arms").stdout
    names = [
        line.split()[1] for line in table.splitlines() if line.startswith("| ") and line[2] > " "
    ]
    assert len(names) >= 16 + 1 and names[:2] == ["arm", "grpo"]
    card = here("arms", "gspo").stdout
    assert card.startswith("gspo: GSPO\n") and "eq. 5-7" in card and "clip_low 0.0003" in card
    assert "nearest are gspo" in here("arms", "gsop").stderr
    assert here("arms", "gspo", "--markdown").returncode == 2
