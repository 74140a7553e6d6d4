"""What the sections of the report say, as plain data for its templates."""

import json
import math
from typing import Any

import pandas as pd

from moe_rl.analysis.data.load import RunKey, StudyRuns
from moe_rl.analysis.report.page import NONE, number
from moe_rl.config import flat_settings
from moe_rl.experiments.arms import arm_label

PHASES = ["rollout", "old_logprobs", "updates", "instruments"]


def run_notes(study: StudyRuns) -> list[str]:
    """Incomplete and absent runs, and what the loader left out, one sentence each."""
    notes = []
    for run in study.runs[~study.runs["complete"]].to_dict("records"):
        planned = run.get("steps")
        of = f" of {int(planned)}" if planned is not None and not pd.isna(planned) else ""
        notes.append(
            f"Incomplete: {run['setting']} / {run['arm']} / seed {run['seed']}, "
            f"{run['steps_done']}{of} steps. Drawn, but in no statistic."
        )
    notes += [f"Not started: {' / '.join(map(str, key))}." for key in absent_runs(study)]
    return notes + [note.replace(f"{study.path}/", "") + "." for note in study.notes]


def absent_runs(study: StudyRuns) -> list[RunKey]:
    """Runs that study.json plans and that have no folder."""
    return [key for key in study.planned if key not in study.configs]


def first_config(study: StudyRuns) -> dict[str, Any]:
    """One whole config of the study as text, and whose it is."""
    (setting, arm, seed), config = next(iter(study.configs.items()))
    text = json.dumps(config, indent=2, sort_keys=True)
    return {"setting": setting, "arm": arm, "seed": seed, "text": text}


def varying_fields(study: StudyRuns) -> list[tuple[str, list[str]]]:
    """Config fields with more than one value over the study, and those values."""
    fields = _differing(list(study.configs.values()), {"setting"})
    return [(name, [", ".join(sorted(set(values)))]) for name, values in fields]


def arm_differences(study: StudyRuns) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The arms of a setting, and the config fields that differ with each arm's value.

    Every arm is compared by its first run.
    """
    first: dict[str, dict[str, Any]] = {}
    for (_, arm, _), config in study.configs.items():
        first.setdefault(arm, config)
    fields = _differing([first[arm] for arm in study.arms], {"arm", "seed", "setting"})
    return [arm_label(arm) for arm in study.arms], fields


def _differing(configs: list[dict[str, Any]], labels: set[str]) -> list[tuple[str, list[str]]]:
    """Fields, `labels` apart, with more than one value, and the value in each config."""
    flat = [flat_settings(config) for config in configs]
    names = sorted({name for config in flat for name in config} - labels)
    rows = [(name, [str(config.get(name, NONE)) for config in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def environment(study: StudyRuns) -> dict[str, Any] | None:
    """Versions, model sizes and where the time went; None where no run is complete."""
    done = study.runs[study.runs["complete"]]
    if done.empty:
        return None
    facts = [
        f"{name} {', '.join(sorted(str(v) for v in done[f'summary_{name}'].dropna().unique()))}"
        for name in ("processor", "cpu_capability", "torch", "transformers", "threads")
        if f"summary_{name}" in done
    ]
    minutes = number(_total(done, "seconds") / 60, 1)
    facts.append(f"{len(done)} complete runs, {minutes} minutes of training in all")
    costs = [
        _arm_costs(arm, done[done["arm"] == arm])
        for arm in study.arms
        if (done["arm"] == arm).any()
    ]
    return {"facts": facts, "phases": PHASES, "costs": costs}


def _arm_costs(arm: str, runs: pd.DataFrame) -> dict[str, Any]:
    def count(name: str) -> str:
        values = runs.get(f"summary_{name}", pd.Series(dtype=float)).dropna()
        return f"{values.iloc[0]:,.0f}" if len(values) else NONE

    seconds, steps = _total(runs, "seconds"), _total(runs, "steps")
    return {
        "arm": arm,
        "parameters": count("parameters"),
        "active": count("active_parameters"),
        "step": seconds / steps if steps else math.nan,
        "phases": [
            _total(runs, f"seconds_{phase}") / seconds if seconds else math.nan for phase in PHASES
        ],
    }


def _total(runs: pd.DataFrame, name: str) -> float:
    """Sum over runs of a number of summary.json; NaN where none has it."""
    column = f"summary_{name}"
    return float(runs[column].sum()) if column in runs else math.nan
