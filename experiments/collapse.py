"""The collapse experiment: the arms of one or two settings on paired seeds, then the report.

moe-rl reproduce --quick     three arms, two seeds, one setting: minutes
moe-rl reproduce --full      six arms, five seeds, two settings
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_rl.config import RoutingReplay, RunConfig, preset
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

    def configs(self) -> list[RunConfig]:
        """One config a run, seed by seed, so that an interrupted study has whole pairs."""
        return [
            arm_config(arm, preset(setting), replay=REPLAY_OF_SETTING[setting], seed=seed)
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
    """Write study.json into a study folder, made if need be."""
    root.mkdir(parents=True, exist_ok=True)
    values = {
        "schema": SCHEMA,
        "name": name,
        "mode": mode,
        "settings": list(settings),
        "arms": list(arms),
        "seeds": list(seeds),
        "command": command,
    }
    write_json(root / "study.json", values)


def quick() -> Study:
    """Three main arms, two seeds."""
    return Study(
        name="collapse", mode="quick", settings=("staleness",), arms=MAIN_ARMS, seeds=(1, 2)
    )


def full() -> Study:
    """All arms and both controls, five paired seeds, staleness and engine noise."""
    return Study(
        name="collapse",
        mode="full",
        settings=("staleness", "engine-noise"),
        arms=tuple(ARMS),
        seeds=(1, 2, 3, 4, 5),
    )
