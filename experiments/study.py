"""A study: the runs it is made of, and study.json, which says what its folder holds."""

import json
from dataclasses import dataclass
from pathlib import Path

from moe_rl.config import SCHEMA, ConfigError, RunConfig
from moe_rl.run_folder.log import write_json


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Runs that belong together, in the order in which they start."""

    name: str
    mode: str
    """quick, full or map."""
    configs: tuple[RunConfig, ...]

    def write(self, root: Path, command: str) -> None:
        """Write study.json into the study folder `root`; `command` says how to make it again.

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
        try:
            theirs = dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else plan
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file}: no study ({error}); give a new folder") from error
        for key, ours in plan.items():
            if theirs.get(key) != ours:
                raise ConfigError(
                    f"out={str(root)!r}: holds a study with {key}={theirs.get(key)!r}, this one "
                    f"has {ours!r}; give another folder"
                )
        root.mkdir(parents=True, exist_ok=True)
        write_json(file, {"schema": SCHEMA} | plan | {"command": command})
