"""The options of the command line, a dataclass a command; field docstrings are their help text."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_rl.config import Family, RunConfig
from moe_rl.run_folder.trackers import TrackerName

_CACHE = Path("runs/cold_start")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How the runs of a study are made."""

    jobs: int = dataclasses.field(default_factory=cores)
    """Runs side by side, one torch thread each."""
    cold_start_cache: Path = _CACHE
    """Folder of cold starts, shared by all studies."""
    dry_run: bool = False
    """Print the runs of the study and stop."""


@dataclass(frozen=True, kw_only=True)
class Reproduce(StudyOptions):
    """Run the collapse experiment and write its report."""

    quick: bool = False
    """Three main arms, two seeds, one setting (the default)."""
    full: bool = False
    """All arms and controls, eight paired seeds, all settings."""
    settings: tuple[str, ...] = ()
    """Settings of the full study. Default: staleness, engine-noise, deeper."""
    family: tuple[Family, ...] = ()
    """Model families to compare under engine noise, a setting each, instead of the settings."""
    out: Path | None = None
    """Study folder. Default: runs/collapse-quick, runs/families-full, ..."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one run."""

    run: Annotated[RunConfig, tyro.conf.OmitArgPrefixes]
    preset: str = "staleness"
    """Settings to start from: staleness, engine-noise or tiny. Other options change them."""
    config: Path | None = None
    """JSON config (or a run folder's config.json) to start from instead of a preset."""
    out: Path | None = None
    """Run folder. Default: runs/SETTING-ARM-seedN."""
    tracker: tuple[TrackerName, ...] = ()
    """Where to show the run beside its files: tensorboard, wandb (offline), trackio."""
    resume: bool = False
    """Go on from the run folder's newest whole checkpoint (see checkpoint_every)."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """How processes of torchrun share the policy: whole copies, or parts of every layer."""
    cold_start_cache: Path = _CACHE
    """Folder of cold starts."""
    dry_run: bool = False
    """Print the resolved config as JSON and stop."""


@dataclass(frozen=True, kw_only=True)
class Map(StudyOptions):
    """Map where each arm stays stable: learning rate x updates per rollout x router noise."""

    learning_rates: tuple[float, ...] = (5e-4, 7e-4, 1e-3)
    """Peak learning rates."""
    updates: tuple[int, ...] = (8, 16)
    """Updates per rollout."""
    noises: tuple[float, ...] = (0.0, 0.135)
    """Router noises (logit units). Above 0, the replay arm replays the engine's record (R3)."""
    arms: tuple[str, ...] = ("grpo", "grpo+replay", "gspo", "dense")
    """Arms to map."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Paired seeds."""
    preset: str = "staleness"
    """Settings that the map varies."""
    out: Path = Path("runs/map")
    """Study folder."""


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Find the router noise at which two passes disagree on a given share of routers or tokens."""

    run: Annotated[RunConfig, tyro.conf.OmitArgPrefixes]
    of: Literal["routers", "tokens"] = "routers"
    """routers: (token, layer) pairs with other expert sets. tokens: those with any such layer."""
    share: float | None = None
    """Wanted share, from 0 to 1. Default: what R3 (2510.11370) reports, 0.1 or 0.94."""
    preset: str = "staleness"
    """Settings to start from."""
    cold_start_cache: Path = _CACHE
    """Folder of cold starts."""


@dataclass(frozen=True, kw_only=True)
class ReplayCrash:
    """Make an update again that met a number that is not finite; exit code 1 if it is now."""

    bundle: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    """Folder that the run left: RUN/crash/STEP-UPDATE."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Redraw a study's report, figures and tables from its files."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Study or run folder."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print versions, devices and which backend each choice takes, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed against peers in one interleaved run."""

    what: tyro.conf.Positional[Literal["training", "logprobs", "routing", "ranks"]] = "training"
    """training: rollout steps per second against TRL's GRPOTrainer, and the cost of instruments;
    logprobs: time, memory and error of token log-probabilities; routing: the cost of record and
    replay; ranks: what a second process gains."""
    repeats: int = 5
    """Interleaved measurements of each side."""
    out: Path | None = None
    """JSON file for the results; logprobs draws a figure beside it."""
    shapes: tuple[str, ...] = ()
    """logprobs: N,H,V of each problem. Default: a CPU's or a GPU's of docs/kernels.md."""
    dtypes: tuple[str, ...] = ()
    """logprobs: float32, bfloat16, float16. Default: the first two, bfloat16 on a GPU."""
    threads: int | None = None
    """logprobs: torch threads on a CPU. Default: all cores."""


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Kill a run again and again, and compare it with one that nothing disturbs."""

    minutes: float = 30.0
    """About how long the killed run lasts."""
    shortest: float = 60.0
    """Least seconds from a start to the next SIGKILL."""
    longest: float = 90.0
    """Most seconds from a start to the next SIGKILL."""
    seed: int = 0
    """Of the runs, and of the times between the kills."""
    out: Path = Path("runs/soak")
    """Folder of both runs and of soak.log."""
    cold_start_cache: Path = _CACHE
    """Folder of cold starts."""


@dataclass(frozen=True, kw_only=True)
class TraceLayout:
    """What a recorded trace does not say of itself."""

    num_layers: int | None = None
    """Of an SGLang response: all decoder layers of the model."""
    top_k: int | None = None
    """Of an SGLang response: experts per token."""
    batch_size: int = 1
    """Of a Megatron-LM trace: sequences in a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class CheckReplay(TraceLayout):
    """Check record and replay on a model, a family, or a recorded trace; exit code 1 on a fail."""

    target: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_FOLDER|FAMILY|TRACE")
    ] = None
    """Folder of a model, a family's name (qwen3_moe), or a file of recorded routes."""
    all: bool = False
    """Every family of the installed transformers, on small models."""
    seed: int = 0
    """Seed of weights, tokens and foreign routes."""
    num_experts: int | None = None
    """Of a trace: experts E that ids must lie below."""


@dataclass(frozen=True, kw_only=True)
class Churn(TraceLayout):
    """Compare two recorded routings of the same tokens: churn by layer and position."""

    trace_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TRACE_A")]
    """npz, npy, safetensors, json (vLLM, SGLang), jsonl or folder (Megatron-LM)."""
    trace_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TRACE_B")]
    """The same tokens, routed by another policy or another engine."""
    plot: Path | None = None
    """Figure to draw, png, svg or pdf."""
