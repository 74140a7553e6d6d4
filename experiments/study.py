"""A study: the runs it is made of, and study.json, which says what its folder holds."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_rl.config import SCHEMA, ConfigError, RoutingReplay, RunConfig
from moe_rl.experiments.arms import arm_config, check_arms, run_of
from moe_rl.run_folder.log import write_json

# Seeds below 21 were looked at while the settings were chosen.
FIVE_SEEDS = (21, 22, 23, 24, 25)
EIGHT_SEEDS = (*FIVE_SEEDS, 26, 27, 28)
Place = tuple[str, str]
"""A setting and an arm."""
Variants = Mapping[str, Mapping[str, Any]]
"""Arms that one study alone has: name, and what it changes in the base config."""


class Comparison(NamedTuple):
    """A test of a study's plan: an outcome at `b` minus that at `a`, on the same seeds."""

    family: str
    """Tests of one family are corrected together."""
    a: Place
    b: Place
    outcome: str = "final"
    """A column of the measures (`analysis.data.measures.run_measures`)."""


def of_arms(base: RunConfig, arms: Iterable[str], seeds: Iterable[int]) -> list[RunConfig]:
    """Runs of arms of the table in one setting, with the replay that it calls for."""
    replay = replay_for(base)
    return [arm_config(arm, base, replay=replay, seed=seed) for seed in seeds for arm in arms]


def replay_for(base: RunConfig) -> RoutingReplay:
    """R2 replays the trainer's own old choice: the answer to staleness.

    Where engine and trainer differ, the record that both can share is the engine's: R3.
    """
    differ = base.router_noise or base.hidden_noise or base.rollout_precision != "float32"
    return "R3" if differ else "R2"


def of_variants(base: RunConfig, variants: Variants, seeds: Iterable[int]) -> list[RunConfig]:
    """Runs of variants in one setting."""
    return [
        run_of(base.replace(**changes), arm, seed)
        for seed in seeds
        for arm, changes in variants.items()
    ]


def seed_by_seed(configs: Iterable[RunConfig]) -> tuple[RunConfig, ...]:
    """The runs in an order in which an interrupted study has whole seeds."""
    return tuple(sorted(configs, key=lambda config: config.seed))


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Runs that belong together, in the order in which they start."""

    name: str
    mode: Literal["quick", "full", "map"]
    configs: tuple[RunConfig, ...]
    analysis: str = ""
    """The analysis plan, written before the runs: arms, seeds, primary outcome, tests."""
    tests: tuple[Comparison, ...] = ()
    """Its tests, but for those of arms against GRPO in one setting, which every report makes."""

    def __post_init__(self) -> None:
        """Refuse a study of nothing.

        Raises:
            ConfigError: it has no run.
        """
        if not self.configs:
            raise ConfigError(
                "no run is left: give at least one arm and one seed, and of a map each axis a "
                "value; the dense control has no router to perturb and needs noise 0"
            )

    def of_seeds(self, seeds: Sequence[int]) -> "StudyPlan":
        """The runs of some of its seeds.

        Raises:
            ConfigError: it has no run of one of them.
        """
        if not seeds:
            raise ConfigError("seeds: none is given; name some of the study's, or leave it out")
        own = sorted({config.seed for config in self.configs})
        for seed in seeds:
            if seed not in own:
                raise ConfigError(
                    f"seeds={seed}: the study has {', '.join(map(str, own))}; use some of these"
                )
        some = tuple(config for config in self.configs if config.seed in seeds)
        return dataclasses.replace(self, configs=some)

    def with_arms(self, names: Sequence[str]) -> "StudyPlan":
        """These arms alone, in all settings and seeds that the study has them in.

        One that the study lacks, or a user's own loss, has a run wherever GRPO has: GRPO's, with
        what the arm changes.

        Raises:
            ConfigError: there is no such arm.
        """
        chosen: list[RunConfig] = []
        for name in dict.fromkeys(names):
            own = [config for config in self.configs if config.arm == name]
            if not own:
                check_arms([name])
                own = [
                    arm_config(name, grpo, replay=replay_for(grpo), seed=grpo.seed)
                    for grpo in self.configs
                    if grpo.arm == "grpo"
                ]
            chosen += own
        return dataclasses.replace(self, configs=seed_by_seed(chosen))

    def write(self, root: Path, command: str) -> None:
        """Write study.json into the study folder `root`; `command` says how to make it again.

        A folder whose study has no other runs than this one goes on with this plan.

        Raises:
            ConfigError: the folder holds another study, or files that are no study.
        """
        file = root / "study.json"
        if not file.is_file() and root.exists() and any(root.iterdir()):
            raise ConfigError(
                f"out={str(root)!r}: holds files that are no study; give a new folder"
            )
        runs = [[config.setting, config.arm, config.seed] for config in self.configs]
        settings, arms, seeds = (list(dict.fromkeys(column)) for column in zip(*runs, strict=True))
        plan = {
            "name": self.name,
            "mode": self.mode,
            "settings": settings,
            "arms": arms,
            "seeds": seeds,
            "runs": runs,
        }
        theirs = read_plan(root) if file.is_file() else plan
        if theirs.get("name") == self.name and all(run in runs for run in theirs.get("runs", [])):
            theirs = plan  # a plan that has grown since goes on in its folder
        for key, ours in plan.items():
            if theirs.get(key) != ours:
                which = "other runs" if key == "runs" else f"{key}={theirs.get(key)!r}"
                wanted = "" if key == "runs" else f", this one has {ours!r}"
                raise ConfigError(
                    f"out={str(root)!r}: holds a study with {which}{wanted}; give another folder"
                )
        root.mkdir(parents=True, exist_ok=True)
        told = {"analysis": self.analysis, "command": command, "tests": self.tests}
        write_json(file, {"schema": SCHEMA} | plan | told)


def read_plan(root: Path) -> dict[str, Any]:
    """What study.json in the study folder `root` holds; empty where there is none.

    Raises:
        ConfigError: the file is no study.
    """
    file = root / "study.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: no study ({error}); give a new folder") from error
