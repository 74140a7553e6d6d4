"""The collapse experiment: the arms of one or two settings on paired seeds, then the report.

moe-rl reproduce --quick     three arms, two seeds, one setting: minutes
moe-rl reproduce --full      six arms, five seeds, two settings
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_rl.config import ConfigError, RoutingReplay, RunConfig, preset
from moe_rl.experiments.arms import ARMS, MAIN_ARMS, arm_config
from moe_rl.runlog import SCHEMA, write_json

# R2 replays the trainer's own old choice: the answer to staleness. Where two engines differ, the
# record that both can share is the rollout engine's: R3.
REPLAY_OF_SETTING: dict[str, RoutingReplay] = {"staleness": "R2", "engine-noise": "R3"}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is run: settings x arms x seeds."""

    name: str
    mode: str
    settings: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    shorten: Callable[[RunConfig], RunConfig] = lambda base: base

    def configs(self) -> list[RunConfig]:
        """One config a run, seed by seed, so that an interrupted study has whole pairs."""
        return [
            arm_config(
                arm, self.shorten(preset(setting)), replay=REPLAY_OF_SETTING[setting], seed=seed
            )
            for setting in self.settings
            for seed in self.seeds
            for arm in self.arms
        ]

    def write(self, root: Path, command: str) -> None:
        """Write study.json, which says what the folder holds and how to make it again."""
        write_study(root, self.name, self.mode, self.settings, self.arms, self.seeds, command)


def write_study(
    root: Path,
    name: str,
    mode: str,
    settings: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    command: str,
) -> None:
    """Write study.json into a study folder, made if need be.

    Raises:
        ConfigError: the folder holds another study, or files that are no study.
    """
    file = root / "study.json"
    if not file.is_file() and root.exists() and any(root.iterdir()):
        raise ConfigError(f"out={str(root)!r}: holds files that are no study; give a new folder")
    values = {
        "schema": SCHEMA,
        "name": name,
        "mode": mode,
        "settings": list(settings),
        "arms": list(arms),
        "seeds": list(seeds),
        "command": command,
    }
    if file.is_file():
        _check_same_study(file, values)
    root.mkdir(parents=True, exist_ok=True)
    write_json(file, values)


def _check_same_study(file: Path, values: dict[str, Any]) -> None:
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give a new folder") from error
    for key in ("name", "mode", "settings", "arms", "seeds"):
        other = theirs.get(key) if isinstance(theirs, dict) else None
        if other != values[key]:
            raise ConfigError(
                f"out={str(file.parent)!r}: holds a study with {key}={other!r}, this one has "
                f"{values[key]!r}; give another folder"
            )


def quick() -> Study:
    """Three main arms, two seeds, shorter runs from a cold start on half the demonstrations."""
    return Study(
        name="collapse",
        mode="quick",
        settings=("staleness",),
        arms=MAIN_ARMS,
        seeds=(1, 2),
        # The learning rate decays over these steps: a whole run in small, not the start of one.
        shorten=lambda base: base.replace(steps=24, sft_batch_size=64),
    )


def full(settings: Sequence[str] = tuple(REPLAY_OF_SETTING)) -> Study:
    """All arms and both controls on five paired seeds.

    Raises:
        ConfigError: a setting that the study does not have.
    """
    unknown = [name for name in settings if name not in REPLAY_OF_SETTING]
    if unknown or not settings:
        raise ConfigError(f"settings={unknown}: expected some of {', '.join(REPLAY_OF_SETTING)}")
    return Study(
        name="collapse",
        mode="full",
        settings=tuple(settings),
        arms=tuple(ARMS),
        seeds=(1, 2, 3, 4, 5),
    )
