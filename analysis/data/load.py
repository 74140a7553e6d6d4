"""Read the run folders of a study into pandas frames.

A study folder holds `study.json` and `runs/<setting>/<arm>/seed<k>/` with `config.json`,
`steps.jsonl`, `updates.jsonl` and, once the run is complete, `summary.json`. A single run folder,
or any folder with run folders below it, is read too: then the settings, arms and seeds are those
found. Nothing is written and nothing is guessed: what is missing is named.
"""

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from moe_rl.config import SCHEMA, flat_settings
from moe_rl.experiments.arms import arm_key
from moe_rl.experiments.study import Comparison

KEYS = ["setting", "arm", "seed"]
# Config columns that the frames `steps` and `updates` carry beside the keys.
CONFIG_COLUMNS = [
    "algorithm", "routing_replay", "learning_rate", "updates_per_rollout", "router_noise",
    "hidden_noise", "rollout_precision", "num_layers", "num_experts", "experts_per_token",
    "digits_per_token",
]  # fmt: skip
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_HOW = "`moe-rl reproduce --out DIR` makes a study, `moe-rl train --out DIR` one run"

RunKey = tuple[str, str, int]


class AnalysisError(ValueError):
    """A folder that cannot be analysed. The message names the path, what is wrong and a way out."""


class AnalysisWarning(UserWarning):
    """Something in a run folder was left out of the frames; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class StudyRuns:
    """What the run folders of a study hold, in memory.

    runs: one row a run: setting, arm, seed, complete, steps_done, every field of its config
        (nested ones under their own name), and the numbers of summary.json as `summary_<name>`.
    steps: one row a rollout step, columns as in steps.jsonl, with the keys and config columns.
    updates: one row an optimiser update, columns as in updates.jsonl, likewise.
    analysis: the plan of the analysis in words, written before the runs.
    tests: the plan's own comparisons.
    planned: every (setting, arm, seed) of study.json; those found where there is no study.json.
    configs: the whole nested config of each (setting, arm, seed).
    notes: what the loader left out or found odd, one line each.
    """

    path: Path
    name: str
    mode: str
    command: str
    settings: list[str]
    arms: list[str]
    runs: pd.DataFrame
    steps: pd.DataFrame
    updates: pd.DataFrame
    planned: list[RunKey]
    configs: dict[RunKey, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    analysis: str = ""
    tests: list[Comparison] = field(default_factory=list)

    def setting(self, name: str) -> "StudyRuns":
        """The same study with only the runs of one setting."""
        return self._only("setting", [name])

    def with_arms(self, names: list[str]) -> "StudyRuns":
        """The same study with only the runs of some arms."""
        return self._only("arm", names)

    def _only(self, key: str, values: list[str]) -> "StudyRuns":
        runs, steps, updates = (
            frame[frame[key].isin(values)].reset_index(drop=True)
            for frame in (self.runs, self.steps, self.updates)
        )
        place = KEYS.index(key)
        return dataclasses.replace(
            self,
            settings=[name for name in self.settings if (runs["setting"] == name).any()],
            arms=[name for name in self.arms if (runs["arm"] == name).any()],
            runs=runs,
            steps=steps,
            updates=updates,
            planned=[run for run in self.planned if run[place] in values],
            configs={run: own for run, own in self.configs.items() if run[place] in values},
        )


def load_study(path: str | Path) -> StudyRuns:
    """Read every run folder under `path`. See `StudyRuns` for what comes back.

    A line that does not parse is skipped with a warning where it is the last of its file (a run
    that was killed while writing) and is an error anywhere else. The strings "NaN", "Infinity" and
    "-Infinity" become floats. Where a step or update is written twice (a run that was started
    again), the later line counts. Runs without `summary.json` are kept with `complete` False.

    Raises AnalysisError for a folder that is missing, holds no run, two runs of one name, a
    malformed line, steps without a reward, or files of another schema.
    """
    root = Path(path)
    if not root.is_dir():
        raise AnalysisError(f"{root}: no such folder; {_HOW}")
    notes: list[str] = []
    study = read_json(root / "study.json") if (root / "study.json").is_file() else {}
    # Checkpoints have a config.json too, of the model: in a study only runs/SETTING/ARM/SEED count.
    files = root.glob("runs/*/*/*/config.json") if study else root.rglob("steps.jsonl")
    folders = sorted(file.parent for file in files)
    if not folders:
        missing = "run folders under runs/" if study else "study.json and no run folder"
        raise AnalysisError(f"{root}: found no {missing} (config.json + steps.jsonl); {_HOW}")

    rows, steps, updates = [], [], []
    configs: dict[RunKey, dict[str, Any]] = {}
    for folder in folders:
        row, config = _read_run(folder)
        key = (row["setting"], row["arm"], row["seed"])
        # Happens where a folder of several studies is given: their runs must not be pooled.
        if key in configs:
            raise AnalysisError(
                f"{folder}: a second run of setting {key[0]!r}, arm {key[1]!r}, seed {key[2]}; "
                "give `moe-rl report` one study at a time"
            )
        configs[key] = config
        run_steps = _metrics_frame(folder / "steps.jsonl", ["step"], row, notes)
        if len(run_steps) and "reward" not in run_steps:
            raise AnalysisError(
                f"{folder / 'steps.jsonl'}: no line has a reward; log the mean reward of every "
                "step as `reward`"
            )
        row["steps_done"] = len(run_steps)
        rows.append(row)
        steps.append(run_steps)
        updates.append(_metrics_frame(folder / "updates.jsonl", ["step", "update"], row, notes))

    planned = [(setting, arm, seed) for setting, arm, seed in study.get("runs", [])]
    # Settings in the order of the study's plan; those it does not name after them, by name.
    named = list(dict.fromkeys(setting for setting, _, _ in planned))
    found = {row["setting"] for row in rows}
    settings = [s for s in named if s in found] + sorted(found - set(named))
    rows.sort(key=lambda row: (settings.index(row["setting"]), arm_key(row["arm"]), row["seed"]))
    return StudyRuns(
        path=root,
        name=study.get("name", root.resolve().name),
        mode=study.get("mode", "single"),
        command=study.get("command", ""),
        analysis=study.get("analysis", ""),
        settings=settings,
        arms=sorted({row["arm"] for row in rows}, key=arm_key),
        runs=pd.DataFrame(rows),
        steps=_concat(steps, ["step"]),
        updates=_concat(updates, ["step", "update"]),
        planned=planned or list(configs),
        configs=configs,
        notes=notes,
        tests=[Comparison(*test) for test in study.get("tests", [])],
    )


def read_json(file: Path) -> dict[str, Any]:
    """One JSON object with our schema number."""
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AnalysisError(f"{file}: not JSON ({error}); {_HOW}") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        schema = value.get("schema") if isinstance(value, dict) else None
        raise AnalysisError(
            f"{file}: schema {schema}, this version reads schema {SCHEMA}; "
            "report it with the version of moe-rl that wrote it"
        )
    return value


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of `runs` and the nested config."""
    config = read_json(folder / "config.json")["config"]
    done = (folder / "summary.json").is_file()
    summary = decode(read_json(folder / "summary.json")) if done else {}
    row: dict[str, Any] = {name: config[name] for name in KEYS}
    row |= {"complete": bool(summary.get("complete", False)), "folder": str(folder)}
    row |= {name: value for name, value in flat_settings(config).items() if name not in row}
    row |= {f"summary_{name}": value for name, value in summary.items() if name != "schema"}
    return row, config


def is_dense(frame: pd.DataFrame) -> bool:
    """Whether all rows come from models whose experts are all always on; False where none says."""
    if frame.empty or not {"num_experts", "experts_per_token"} <= set(frame):
        return False
    return bool((frame["num_experts"] == frame["experts_per_token"]).all())


def _metrics_frame(
    file: Path, unique: list[str], row: dict[str, Any], notes: list[str]
) -> pd.DataFrame:
    """The lines of one metrics file with the keys and config columns of its run in front."""
    frame = pd.DataFrame(_metrics_rows(file, unique, notes))
    if frame.empty:
        return frame
    twice = int(frame.duplicated(unique, keep="last").sum())
    if twice:
        _note(notes, f"{file}: {twice} lines are written twice, the later ones count")
        frame = frame.drop_duplicates(unique, keep="last")
    frame = frame.sort_values(unique, kind="stable")
    front = {name: row.get(name) for name in KEYS + CONFIG_COLUMNS if name not in frame}
    front["complete"] = row["complete"]
    return pd.concat([pd.DataFrame(front, index=frame.index), frame], axis=1)


def _metrics_rows(file: Path, needs: list[str], notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file as dictionaries; each must have the keys `needs`."""
    if not file.is_file():
        _note(notes, f"{file}: missing, the run has written none")
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            _ = [value[name] for name in needs]
        except (ValueError, KeyError, TypeError) as error:
            # A killed run leaves half a last line; anywhere else a line was damaged later.
            if number < len(lines):
                raise AnalysisError(
                    f"{file}:{number}: malformed line ({error!r}); delete the run's folder and run "
                    "the study's command again"
                ) from error
            _note(notes, f"{file}:{number}: torn last line skipped")
        else:
            rows.append(decode(value))
    return rows


def decode(value: Any) -> Any:
    """JSON values of ours with the strings that stand for NaN and inf as floats, at any depth."""
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    return value


def _note(notes: list[str], message: str) -> None:
    notes.append(message)
    warnings.warn(message, AnalysisWarning, stacklevel=2)


def _concat(frames: list[pd.DataFrame], needs: list[str]) -> pd.DataFrame:
    filled = [frame for frame in frames if not frame.empty]
    if not filled:
        return pd.DataFrame(columns=[*KEYS, *CONFIG_COLUMNS, *needs])
    return pd.concat(filled, ignore_index=True)
