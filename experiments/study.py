"""A study: the runs it is made of, and study.json, which says what its folder holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_rl.config import SCHEMA, ConfigError, RunConfig
from moe_rl.run_folder.log import write_json
from moe_rl.runtime.json_text import parse_json


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Runs that belong together, in the order in which they start."""

    name: str
    mode: str
    """quick, full or map."""
    configs: tuple[RunConfig, ...]

    def write(self, root: Path, command: str) -> None:
        """Write study.json into a study folder, made if need be.

        Args:
            root: the study folder.
            command: how to make it again.

        Raises:
            ConfigError: the folder holds another study, or files that are no study.
        """
        file = root / "study.json"
        if not file.is_file() and root.exists() and any(root.iterdir()):
            raise ConfigError(
                f"out={str(root)!r}: holds files that are no study; give a new folder"
            )
        values = {"schema": SCHEMA} | self._plan() | {"command": command}
        if file.is_file():
            _check_same_study(file, values)
        root.mkdir(parents=True, exist_ok=True)
        write_json(file, values)

    def _plan(self) -> dict[str, Any]:
        runs = [[config.setting, config.arm, config.seed] for config in self.configs]
        settings, arms, seeds = (list(dict.fromkeys(column)) for column in zip(*runs, strict=True))
        return {
            "name": self.name,
            "mode": self.mode,
            "settings": settings,
            "arms": arms,
            "seeds": seeds,
            "runs": runs,
        }


def _check_same_study(file: Path, values: dict[str, Any]) -> None:
    try:
        theirs = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give a new folder") from error
    for key in ("name", "mode", "settings", "arms", "seeds", "runs"):
        other = theirs.get(key) if isinstance(theirs, dict) else None
        if other != values[key]:
            raise ConfigError(
                f"out={str(file.parent)!r}: holds a study with {key}={other!r}, this one has "
                f"{values[key]!r}; give another folder"
            )
