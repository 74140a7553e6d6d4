"""Options that several commands share. Field docstrings are their `--help` text."""

import abc
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from moe_rl.config import RunConfig, load_config
from moe_rl.experiments.executors import ExecutorName
from moe_rl.presets import PresetName, preset

if TYPE_CHECKING:
    from moe_rl.traces.files import Trace

COLD_STARTS = Path("runs/cold_start")


class Command(abc.ABC):
    """A subcommand: a dataclass of its options, and what it does with them."""

    interrupted: ClassVar[str] = ""
    """What an interrupt leaves behind, and how to continue."""

    @abc.abstractmethod
    def run(self) -> int:
        """Do it; returns the exit code."""


_one_of = tyro.conf.create_mutex_group(required=False, title="base settings")


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The settings that the other options of a command change."""

    preset: Annotated[PresetName, _one_of] = "mild-stale"
    """Preset whose settings the other options change."""
    config: Annotated[Path | None, _one_of] = None
    """JSON file (such as a run folder's config.json) to use instead of a preset."""

    def load(self) -> RunConfig:
        """The config that they name."""
        return preset(self.preset) if self.config is None else load_config(str(self.config))


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How the runs of a study are executed."""

    jobs: int | None = None
    """Runs in parallel, one torch thread each (>= 1). Default: the number of cores, here or of the
    cluster; 256 with slurm."""
    executor: ExecutorName = "local"
    """Where runs are executed: this machine, a Ray cluster, or Slurm through submitit."""
    address: str | None = None
    """Address of the Ray cluster; auto: the one that runs here. Default: start one here."""
    slurm: dict[str, str] = dataclasses.field(default_factory=dict)
    """Options of submitit, as in `--slurm slurm_partition cpu timeout_min 60`."""
    cold_start_cache: Path = COLD_STARTS
    """Folder of cold starts, shared by all studies."""
    dry_run: bool = False
    """List the runs of the study and exit."""


@dataclass(frozen=True, kw_only=True)
class TraceLayout:
    """What some kinds of recorded traces do not say about themselves."""

    num_layers: int | None = None
    """For an SGLang response: number of decoder layers of the model."""
    top_k: int | None = None
    """For an SGLang response: number of experts per token."""
    batch_size: int = 1
    """For a Megatron-LM trace: sequences per micro-batch."""
    array: str = "routed_experts"
    """Name of the array, field or column that holds the routes."""

    def read(self, path: Path) -> "Trace":
        """The trace in a file or folder."""
        from moe_rl.traces.files import read_trace

        layout = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(TraceLayout)
        }
        return read_trace(path, **layout)
