"""Analysis room: read the run folders of a study into pandas frames.

A study folder holds `study.json` and `runs/<setting>/<arm>/seed<k>/` with `config.json`,
`steps.jsonl`, `updates.jsonl` and, once the run is complete, `summary.json`. A single run folder,
or any folder with run folders below it, is read too: then the settings, arms and seeds are those
found. Nothing is written and nothing is guessed: what is missing is named.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from moe_rl.analysis.arms import arm_key
from moe_rl.runtime.json_text import parse_json

SCHEMA = 1
KEYS = ["setting", "arm", "seed"]
# Config columns that the frames `steps` and `updates` carry beside the keys.
CONFIG_COLUMNS = [
    "algorithm", "routing_replay", "learning_rate", "updates_per_rollout", "router_noise",
    "num_layers", "num_experts", "experts_per_token",
]  # fmt: skip
# What a line of each file must have beside its place.
_NUMBERS = {"steps.jsonl": ("reward",)}
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_HOW = "`moe-rl reproduce --quick --out DIR` makes a study, `moe-rl train --out DIR` one run"

RunKey = tuple[str, str, int]


class AnalysisError(ValueError):
    """A folder that cannot be analysed. The message names the path, what is wrong and a way out."""


class AnalysisWarning(UserWarning):
    """Something in a run folder was left out of the frames; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study in memory.

    runs: one row a run: setting, arm, seed, complete, steps_done, every field of its config
        (nested ones under their own name), and the numbers of summary.json as `summary_<name>`.
    steps: one row a rollout step, columns as in steps.jsonl, with the keys and config columns.
    updates: one row an optimiser update, columns as in updates.jsonl, likewise.
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
    planned: list[RunKey] = field(default_factory=list)
    configs: dict[RunKey, dict[str, Any]] = field(default_factory=dict)
    summaries: dict[RunKey, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def setting(self, name: str) -> Study:
        """The same study with only the runs of one setting."""
        return Study(
            path=self.path,
            name=self.name,
            mode=self.mode,
            command=self.command,
            settings=[name],
            arms=self.arms,
            runs=self.runs[self.runs["setting"] == name].reset_index(drop=True),
            steps=self.steps[self.steps["setting"] == name].reset_index(drop=True),
            updates=self.updates[self.updates["setting"] == name].reset_index(drop=True),
            planned=[key for key in self.planned if key[0] == name],
            configs={key: value for key, value in self.configs.items() if key[0] == name},
            summaries={key: value for key, value in self.summaries.items() if key[0] == name},
            notes=self.notes,
        )


def load_study(path: str | Path) -> Study:
    """Read every run folder under `path`. See `Study` for what comes back.

    A line that does not parse is skipped with a warning where it is the last of its file (a run
    that was killed while writing) and is an error anywhere else. The strings "NaN", "Infinity" and
    "-Infinity" become floats. Where a step or update is written twice (a run that was started
    again), the later line counts. Runs without `summary.json` are kept with `complete` False.

    Raises AnalysisError for a folder that is missing, holds no run, or holds files of another kind
    or schema.
    """
    root = Path(path)
    if not root.is_dir():
        raise AnalysisError(f"{root}: no such folder; {_HOW}")
    notes: list[str] = []
    study = _read_json(root / "study.json") if (root / "study.json").is_file() else {}
    folders = sorted(_run_folders(root, is_study=bool(study)))
    if not folders:
        missing = "run folders under runs/" if study else "study.json and any run folder"
        raise AnalysisError(f"{root}: found no {missing} (config.json + steps.jsonl); {_HOW}")

    rows, steps, updates = [], [], []
    configs: dict[RunKey, dict[str, Any]] = {}
    summaries: dict[RunKey, dict[str, Any]] = {}
    for folder in folders:
        row, config, summary = _read_run(folder)
        key = (row["setting"], row["arm"], row["seed"])
        if key in configs:
            raise AnalysisError(
                f"{folder}: a second run of setting {key[0]!r}, arm {key[1]!r}, seed {key[2]}; "
                "give `moe-rl report` one study at a time"
            )
        configs[key], summaries[key] = config, summary
        run_steps = _jsonl_frame(folder / "steps.jsonl", ["step"], row, notes)
        run_updates = _jsonl_frame(folder / "updates.jsonl", ["step", "update"], row, notes)
        row["steps_done"] = len(run_steps)
        rows.append(row)
        steps.append(run_steps)
        updates.append(run_updates)

    runs = pd.DataFrame(rows)
    runs = _in_order(runs, KEYS, _setting_order(study, runs))
    return Study(
        path=root,
        name=str(study.get("name", root.resolve().name)),
        mode=str(study.get("mode", "single")),
        command=str(study.get("command", "")),
        settings=list(runs["setting"].unique()),
        arms=sorted(runs["arm"].unique(), key=arm_key),
        runs=runs,
        steps=_concat(steps, ["step"]),
        updates=_concat(updates, ["step", "update"]),
        planned=_planned(study) or list(configs),
        configs=configs,
        summaries=summaries,
        notes=notes,
    )


def _planned(study: dict[str, Any]) -> list[RunKey]:
    try:
        return [(str(s), str(arm), int(seed)) for s, arm, seed in study.get("runs", [])]
    except (TypeError, ValueError) as error:
        raise AnalysisError(
            f"study.json: runs must be [setting, arm, seed] each; {_HOW}"
        ) from error


def _run_folders(root: Path, is_study: bool) -> Iterator[Path]:
    # Checkpoints have a config.json too, of the model: of a study only runs/SETTING/ARM/SEED count.
    if is_study:
        yield from (file.parent for file in (root / "runs").glob("*/*/*/config.json"))
    else:
        yield from (file.parent for file in root.rglob("steps.jsonl"))


def _read_json(file: Path) -> dict[str, Any]:
    """One JSON object with our schema number."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"), unique_keys=False)
    except FileNotFoundError as error:
        raise AnalysisError(f"{file}: missing, so this is not a run folder; {_HOW}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AnalysisError(f"{file}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise AnalysisError(f"{file}:{error.lineno}: not JSON ({error.msg}); {_HOW}") from error
    except ValueError as error:
        raise AnalysisError(f"{file}: {error}; {_HOW}") from error
    if not isinstance(value, dict) or "schema" not in value:
        raise AnalysisError(f'{file}: not a file of moe-rl (it has no "schema"); {_HOW}')
    if value["schema"] != SCHEMA:
        raise AnalysisError(
            f"{file}: schema {value['schema']!r}, this version reads schema {SCHEMA}; "
            "report it with the version of moe-rl that wrote it"
        )
    return value


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The row of `runs`, the nested config and the summary ({} for an incomplete run)."""
    config = _read_json(folder / "config.json").get("config")
    if not isinstance(config, dict) or not {"setting", "arm", "seed"} <= config.keys():
        raise AnalysisError(f"{folder / 'config.json'}: no setting, arm and seed in it; {_HOW}")
    done = (folder / "summary.json").is_file()
    summary = _decode(_read_json(folder / "summary.json")) if done else {}
    if not isinstance(config["seed"], int):
        raise AnalysisError(
            f"{folder / 'config.json'}: seed {config['seed']!r} is not a whole number; {_HOW}"
        )
    for name in ("seconds", "instruments_share"):
        if not isinstance(summary.get(name, 0.0), int | float):
            raise AnalysisError(
                f"{folder / 'summary.json'}: {name} {summary[name]!r} is not a number; delete the "
                "run's folder and run the study's command again"
            )
    row: dict[str, Any] = {
        "setting": str(config["setting"]),
        "arm": str(config["arm"]),
        "seed": config["seed"],
        "complete": bool(summary.get("complete", False)),
        "folder": str(folder),
    }
    flat = flatten(config)
    row |= {name: flat[name] for name in flat if name not in row}
    row |= {f"summary_{name}": v for name, v in summary.items() if name not in ("schema",)}
    return row, config, summary


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config as one level; fields of nested configs come under their own name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value) if isinstance(value, dict) else {name: value}
    return flat


def _jsonl_frame(
    file: Path, unique: list[str], row: dict[str, Any], notes: list[str]
) -> pd.DataFrame:
    """The lines of one metrics file with the keys and config columns of its run in front."""
    frame = pd.DataFrame(_jsonl_rows(file, unique, notes))
    if frame.empty:
        return frame
    twice = int(frame.duplicated(unique, keep="last").sum())
    if twice:
        _note(notes, f"{file}: {twice} lines are written twice, the later ones count")
        frame = frame.drop_duplicates(unique, keep="last")
    frame = frame.sort_values(unique, kind="stable")
    # The learning rate of a step is the schedule's; the run's own is its peak.
    front = {name: row.get(name) for name in KEYS + CONFIG_COLUMNS if name not in frame}
    front["peak_learning_rate"] = row.get("learning_rate")
    front["complete"] = row["complete"]
    return pd.concat([pd.DataFrame(front, index=frame.index), frame], axis=1)


def _jsonl_rows(file: Path, needs: list[str], notes: list[str]) -> list[dict[str, Any]]:
    if not file.is_file():
        _note(notes, f"{file}: missing, the run has written none")
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line, unique_keys=False)
            if not isinstance(value, dict) or not set(needs) <= value.keys():
                raise ValueError(f"no {' and '.join(needs)} in it")
            if not all(isinstance(value[name], int) for name in needs):
                raise ValueError(f"{' and '.join(needs)} must be whole numbers")
            _check_numbers(value := _decode(value), _NUMBERS.get(file.name, ()))
        except ValueError as error:
            if number < len(lines):
                raise AnalysisError(
                    f"{file}:{number}: malformed line ({error}); delete the run's folder and run "
                    "the study's command again"
                ) from error
            _note(notes, f"{file}:{number}: torn last line skipped")
            continue
        rows.append(value)
    return rows


def _check_numbers(line: dict[str, Any], required: tuple[str, ...]) -> None:
    """Raises ValueError where a number is missing, or a value is neither that nor a list of it."""
    for name in required:
        if name not in line:
            raise ValueError(f"no {name} in it")
    for name, value in line.items():
        entries = value if name.endswith(("_per_layer", "_per_position")) else [value]
        if not isinstance(entries, list) or not all(isinstance(e, int | float) for e in entries):
            raise ValueError(f"{name} is {value!r:.40}")


def _decode(value: Any) -> Any:
    """The strings that stand for non-finite floats become floats, at any depth."""
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return value


def _note(notes: list[str], message: str) -> None:
    notes.append(message)
    warnings.warn(message, AnalysisWarning, stacklevel=2)


def _setting_order(study: dict[str, Any], runs: pd.DataFrame) -> list[str]:
    named = list(dict.fromkeys(setting for setting, _, _ in _planned(study)))
    found = sorted(runs["setting"].unique())
    return [name for name in named if name in found] + [n for n in found if n not in named]


def _in_order(frame: pd.DataFrame, keys: list[str], settings: list[str]) -> pd.DataFrame:
    def rank(column: pd.Series) -> pd.Series:
        if column.name == "setting":
            return column.map(settings.index)
        return column.map(arm_key) if column.name == "arm" else column

    return frame.sort_values(keys, key=rank, kind="stable").reset_index(drop=True)


def _concat(frames: list[pd.DataFrame], needs: list[str]) -> pd.DataFrame:
    filled = [frame for frame in frames if not frame.empty]
    if not filled:
        return pd.DataFrame(columns=[*KEYS, *CONFIG_COLUMNS, *needs])
    return pd.concat(filled, ignore_index=True)
