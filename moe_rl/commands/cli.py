"""The command line: `moe-rl COMMAND`, also `python -m moe_rl COMMAND`.

Each command is a dataclass of options in a module of its name; torch is imported only by commands
that need it. Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted, 141 the reader of
the output is gone, 143 ended by SIGTERM.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any, Union

import tyro

from moe_rl import __version__
from moe_rl.commands.arms import Arms
from moe_rl.commands.audit import Audit
from moe_rl.commands.bench import Bench
from moe_rl.commands.calibrate import Calibrate
from moe_rl.commands.check_replay import CheckReplay
from moe_rl.commands.churn import Churn
from moe_rl.commands.compare import Compare
from moe_rl.commands.debug_crash import DebugCrash
from moe_rl.commands.doctor import Doctor
from moe_rl.commands.inspect import Inspect
from moe_rl.commands.map import Map
from moe_rl.commands.messages import complain, explain, format_warning
from moe_rl.commands.options import BaseSettings, Command
from moe_rl.commands.pool import Pool
from moe_rl.commands.report import Report
from moe_rl.commands.reproduce import Reproduce
from moe_rl.commands.study import Study
from moe_rl.commands.train import Train
from moe_rl.commands.warning import Warning as EarlyWarning
from moe_rl.commands.watch import Watch

INTERRUPTED = 130
READER_GONE = 141

COMMANDS: tuple[type[Command], ...] = (
    Reproduce,
    Train,
    Study,
    Arms,
    Map,
    Calibrate,
    DebugCrash,
    Report,
    Compare,
    Pool,
    Watch,
    EarlyWarning,
    CheckReplay,
    Audit,
    Inspect,
    Churn,
    Doctor,
    Bench,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(__version__)
        return 0
    warnings.formatwarning = format_warning
    interrupted = ""
    try:
        command = parse(arguments)
        interrupted = command.interrupted
        return command.run()
    except SystemExit as stop:  # tyro has printed the help or what is wrong with an option
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}" if interrupted else "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_gone(interrupted)
    except Exception as error:
        explained = explain(error)
        if explained is None or os.environ.get("MOE_RL_TRACEBACK"):
            raise
        code, message = explained
        complain(message)
        return code


def parse(arguments: Sequence[str]) -> Command:
    """The command with its options.

    Raises:
        ConfigError: the file of --config cannot be used.
        SystemExit: after `--help`, or a wrong option.
    """
    # --preset and --config name the defaults of the other options, so they are parsed before them.
    base, _ = tyro.cli(BaseSettings, args=arguments, return_unknown_args=True, add_help=False)
    settings = base.load()
    choices: list[Any] = [
        Annotated[options, tyro.conf.subcommand(default=options(settings=settings))]
        if issubclass(options, Train | Calibrate)
        else options
        for options in COMMANDS
    ]
    command_line: Any = make_dataclass("CommandLine", [("command", Union[tuple(choices)])])  # noqa: UP007
    parsed = tyro.cli(
        command_line,
        args=arguments,
        prog="moe-rl",
        description="Reinforcement learning on Mixture-of-Experts models: train, measure, compare.",
        config=(
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
        ),
    )
    command: Command = parsed.command
    return command


def _reader_gone(interrupted: str) -> int:
    """The exit code when nobody reads the output any more, as in `moe-rl ... | head`."""
    # Python would complain again when it flushes what is left.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    if not interrupted:
        return 0
    try:
        complain(f"nobody reads the output any more; {interrupted}")
    except BrokenPipeError:  # `2>&1 | head`
        os.dup2(nowhere, sys.stderr.fileno())
    return READER_GONE
