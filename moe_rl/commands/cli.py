"""The command line: `moe-rl COMMAND`, also `python -m moe_rl COMMAND`.

Options are the fields of `moe_rl.commands.options` and `moe_rl.config`; heavy imports wait until a
command needs them. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted, 141 nobody
reads what a run prints, 143 ended by SIGTERM.
"""

import contextlib
import difflib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from moe_rl import __version__
from moe_rl.commands.options import (
    Bench,
    Calibrate,
    CheckReplay,
    Churn,
    Doctor,
    Map,
    ReplayCrash,
    Report,
    Reproduce,
    Soak,
    StudyOptions,
    Train,
    cores,
)
from moe_rl.commands.usage import describe_os_error, is_lost_peer, is_out_of_memory, one_line, parse
from moe_rl.config import ConfigError, RunConfig, load_config, preset
from moe_rl.run_folder.trackers import Tracker, make_trackers
from moe_rl.runtime.stopping import PeerFailed, Stopped

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
READER_GONE = 141


def reproduce(options: Reproduce) -> int:
    """`moe-rl reproduce`."""
    from moe_rl.experiments import collapse

    if options.quick and options.full:
        raise ConfigError("quick=True with full=True: choose one")
    if options.settings and not options.full:
        raise ConfigError(f"settings={options.settings}: of the full study; add --full")
    if options.settings and options.family:
        raise ConfigError(
            f"settings={options.settings} with family={options.family}: choose one; families have "
            "a setting each"
        )
    name = "families" if options.family else "collapse"
    root = options.out or Path(f"runs/{name}-{'full' if options.full else 'quick'}")
    if not options.full:
        study = collapse.quick(options.family)
    elif options.family:
        study = collapse.full_families(options.family)
    else:
        study = collapse.full(root, options.settings)
    return _run_study(study, root, options)


def map_(options: Map) -> int:
    """`moe-rl map`."""
    from moe_rl.experiments import collapse_map

    study = collapse_map.grid(
        base=preset(options.preset),
        learning_rates=options.learning_rates,
        updates=options.updates,
        noises=options.noises,
        arms=options.arms,
        seeds=options.seeds,
    )
    return _run_study(study, options.out, options)


def _run_study(study: Any, root: Path, options: StudyOptions) -> int:
    from moe_rl.experiments.runner import check_study, run_all

    configs = study.configs
    check_study(configs, root, jobs=options.jobs)
    if options.dry_run:
        for config in configs:
            print(f"{config.setting:<24} {config.arm:<14} seed {config.seed}")
        print(f"{len(configs)} runs into {root}")
        return 0
    from moe_rl.training.cold_start import prepare_cold_starts

    study.write(root, shlex.join(["moe-rl", *sys.argv[1:]]))
    prepare_cold_starts(configs, options.cold_start_cache)
    failures = run_all(configs, root, jobs=options.jobs, cold_start_cache=options.cold_start_cache)
    for failure in failures:
        print(f"{failure.folder}: {failure.reason}", file=sys.stderr)
    _report(root)
    return 1 if failures else 0


def _report(root: Path) -> None:
    from moe_rl.analysis import load_study, summarize, terminal_table, write_report

    study = load_study(root)
    page = write_report(root, study)
    print(terminal_table(summarize(study)))
    print(f"report: {page}")


def train(options: Train) -> int:
    """`moe-rl train`."""
    from moe_rl.run_folder.log import check_run_folder, check_unlocked, is_complete, run_name
    from moe_rl.training.inputs import check_checkpoint, check_engine, resolved

    # What needs no torch comes first: it is found at once.
    config = resolved(options.run)
    if not options.resume:  # which goes on from a checkpoint of its own
        check_checkpoint(config)
    folder = options.out or Path("runs") / run_name(config)
    if not options.dry_run:
        check_run_folder(folder, config)
        check_unlocked(folder)
        if is_complete(folder):
            _say(f"{folder}: this run is complete already")
            return 0
        check_engine(config)
    trackers = [] if options.dry_run else make_trackers(options.tracker)
    from moe_rl.training.start import clip_range

    clip_range(config)  # refused here, before a cold start is trained
    if options.dry_run:
        print(json.dumps(config.to_dict(), indent=2))
        return 0
    try:
        summary = _train(options, config, folder, trackers)
    except Stopped as stopped:
        _complain(f"{stopped}; the same command with --resume goes on from it")
        return 128 + stopped.number
    _say(f"final reward {summary['final_reward']:.3f} in {summary['seconds']:.0f} s: {folder}")
    return 0


def _train(
    options: Train, config: RunConfig, folder: Path, trackers: Sequence[Tracker]
) -> dict[str, Any]:
    from moe_rl.commands.progress import cold_start_progress, run_progress
    from moe_rl.training.run import train as train_run

    with contextlib.ExitStack() as stack:
        on_step = stack.enter_context(run_progress(config)) if _main_rank() else None
        return train_run(
            config,
            folder,
            cold_start_cache=options.cold_start_cache,
            resume=options.resume,
            parallelism=options.parallelism,
            trackers=trackers,
            on_step=on_step,
            on_cold_start=stack.enter_context(cold_start_progress()),
            on_damage=_complain if _main_rank() else lambda _: None,
        )


def _main_rank() -> bool:
    """Whether this process talks to the user; of several that train together one does."""
    return os.environ.get("RANK", "0") == "0"


def _say(message: str) -> None:
    if _main_rank():
        print(message)


def replay_crash(options: ReplayCrash) -> int:
    """`moe-rl replay-crash BUNDLE`."""
    from moe_rl.commands.debug_crash import replay_crash

    result = replay_crash(options.bundle)
    print(result.describe())
    return 0 if result.found else FAILED


def calibrate(options: Calibrate) -> int:
    """`moe-rl calibrate`."""
    from moe_rl.commands.calibrate import calibrate_noise

    result = calibrate_noise(
        options.run, options.cold_start_cache, of=options.of, share=options.share
    )
    print(result.describe())
    return 0


def report(options: Report) -> int:
    """`moe-rl report RUN_DIR`."""
    _report(options.run_dir)
    return 0


def doctor(_: Doctor) -> int:
    """`moe-rl doctor`."""
    from moe_rl.commands.doctor import describe

    print(describe())
    return 0


def bench(options: Bench) -> int:
    """`moe-rl bench training`, and the other races."""
    if options.what == "logprobs":
        from moe_rl.experiments.bench.logprobs import bench_logprobs

        return bench_logprobs(
            repeats=options.repeats,
            shapes=options.shapes,
            dtypes=options.dtypes,
            threads=cores() if options.threads is None else options.threads,
            out=options.out,
        )
    for name in ("shapes", "dtypes", "threads"):
        if getattr(options, name):
            raise ConfigError(f"{name} belongs to moe-rl bench logprobs, not to {options.what}")
    if options.what == "routing":
        from moe_rl.experiments.bench.routing import bench_routing

        return bench_routing(repeats=options.repeats, out=options.out)
    if options.what == "ranks":
        from moe_rl.experiments.bench.ranks import bench_ranks

        return bench_ranks(repeats=options.repeats, out=options.out)
    from moe_rl.experiments.bench.training import bench_training

    return bench_training(repeats=options.repeats, out=options.out)


def soak(options: Soak) -> int:
    """`moe-rl soak`."""
    from moe_rl.experiments.bench.soak import soak

    return soak(
        minutes=options.minutes,
        shortest=options.shortest,
        longest=options.longest,
        seed=options.seed,
        out=options.out,
        cold_start_cache=options.cold_start_cache,
    )


def check_replay(options: CheckReplay) -> int:
    """`moe-rl check-replay`."""
    from moe_rl.commands.check_replay import check_target

    return check_target(
        options.target,
        everything=options.all,
        seed=options.seed,
        num_experts=options.num_experts,
        num_layers=options.num_layers,
        top_k=options.top_k,
        batch_size=options.batch_size,
    )


def churn(options: Churn) -> int:
    """`moe-rl churn TRACE_A TRACE_B`."""
    from moe_rl.commands.churn import churn_report

    return churn_report(
        options.trace_a,
        options.trace_b,
        plot=options.plot,
        num_layers=options.num_layers,
        top_k=options.top_k,
        batch_size=options.batch_size,
    )


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    options: type
    run: Callable[[Any], int]
    has_config: bool = False
    """Whether its options hold a RunConfig."""
    kept: str = ""
    """What an interrupt leaves behind."""


_TRAIN_KEPT = "the same command starts anew, or with --resume goes on from its last checkpoint"
_STUDY_KEPT = "finished runs are kept, the same command goes on from here"


COMMANDS = {
    "reproduce": Command(Reproduce, reproduce, kept=_STUDY_KEPT),
    "train": Command(Train, train, has_config=True, kept=_TRAIN_KEPT),
    "map": Command(Map, map_, kept=_STUDY_KEPT),
    "calibrate": Command(Calibrate, calibrate, has_config=True),
    "replay-crash": Command(ReplayCrash, replay_crash),
    "report": Command(Report, report),
    "check-replay": Command(CheckReplay, check_replay),
    "churn": Command(Churn, churn),
    "doctor": Command(Doctor, doctor),
    "bench": Command(Bench, bench),
    "soak": Command(Soak, soak),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return _bad_input(f"unknown command {name!r}{hint} (see moe-rl --help)")
    warnings.formatwarning = _format_warning
    try:
        return COMMANDS[name].run(_parse(name, rest))
    except KeyboardInterrupt:
        kept = COMMANDS[name].kept
        print(f"interrupted; {kept}" if kept else "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has read enough; Python would complain again when it flushes.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        if not COMMANDS[name].kept:
            return 0
        try:
            _complain(f"nobody reads the output any more; {COMMANDS[name].kept}")
        except BrokenPipeError:  # `2>&1 | head`
            os.dup2(nowhere, sys.stderr.fileno())
        return READER_GONE
    except ValueError as error:
        if os.environ.get("MOE_RL_TRACEBACK"):
            raise
        return _bad_input(str(error))
    except OSError as error:
        if os.environ.get("MOE_RL_TRACEBACK"):
            raise
        return _bad_input(describe_os_error(error))
    except (FloatingPointError, PeerFailed) as error:
        if os.environ.get("MOE_RL_TRACEBACK"):
            raise
        _complain(str(error))
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("MOE_RL_TRACEBACK"):
            raise
        if "RANK" in os.environ and is_lost_peer(error):
            _complain(f"a process it trained with is gone ({str(error).splitlines()[0]:.120})")
            return FAILED
        if not is_out_of_memory(error):
            raise
        return _bad_input(
            f"this does not fit into memory ({str(error).splitlines()[0]:.120}); take smaller sizes"
        )


_SHORT = {"--experts": "--experts-implementation"}


def _spelled_out(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return _SHORT.get(name, name) + equals + value


def _parse(name: str, arguments: list[str]) -> Any:
    command = COMMANDS[name]
    program = f"moe-rl {name}"
    if not command.has_config:
        return parse(command.options, arguments, program)
    base = _base_config(arguments)
    return parse(
        command.options,
        [_spelled_out(argument) for argument in arguments],
        program,
        default=command.options(run=base),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _base_config(arguments: list[str]) -> RunConfig:
    """The config that --config or --preset names, which the other options then change."""
    named = {"--preset": "", "--config": ""}
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in named:
            named[key] = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
    if named["--config"] and named["--preset"]:
        raise ConfigError("--config with --preset: choose one to start from")
    if named["--config"]:
        return load_config(named["--config"])
    return preset(named["--preset"] or "staleness")


_format_any = warnings.formatwarning


def _format_warning(message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
    """One line for a warning of ours, which speaks of files, not of a line of source."""
    if category.__module__.startswith("moe_rl."):
        return f"moe-rl: {message}\n"
    return _format_any(message, category, *where, **line)


def _bad_input(message: str) -> int:
    _complain(message)
    return BAD_INPUT


def _complain(message: str) -> None:
    rank = "" if _main_rank() else f" (rank {os.environ['RANK']})"
    print(f"moe-rl{rank}: {one_line(message)}", file=sys.stderr)


def _usage() -> str:
    lines = ["usage: moe-rl COMMAND [OPTIONS]", ""]
    lines += [
        f"  {name:<12} {(command.options.__doc__ or '').splitlines()[0]}"
        for name, command in COMMANDS.items()
    ]
    lines += ["", "moe-rl COMMAND --help lists a command's options."]
    return "\n".join(lines)
