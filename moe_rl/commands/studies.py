"""What `reproduce`, `study`, `map` and `report` share: make a study's runs, write its report."""

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moe_rl.commands.options import StudyOptions

if TYPE_CHECKING:
    from moe_rl.experiments.study import StudyPlan

INTERRUPTED = "finished runs are kept, the same command continues from there"


def run_study(study: "StudyPlan", root: Path, options: StudyOptions) -> int:
    """Run what is not complete yet, then report; returns the exit code, 1 if a run failed."""
    from moe_rl.experiments.executors import make_executor
    from moe_rl.experiments.runner import check_study, run_all, run_folder
    from moe_rl.run_folder.log import is_complete

    study = _pin_losses(study)
    configs = study.configs
    check_study(configs, root, jobs=options.jobs)
    if options.dry_run:
        for config in configs:
            print(f"{config.setting:<24} {config.arm:<14} seed {config.seed}")
        print(f"{len(configs)} runs into {root}")
        return 0
    from moe_rl.training.cold_start import prepare_cold_starts

    start = time.monotonic()
    executor = make_executor(
        options.executor, options.cold_start_cache, address=options.address, slurm=options.slurm
    )
    study.write(root, shlex.join(["moe-rl", *sys.argv[1:]]))
    prepare_cold_starts(configs, options.cold_start_cache)
    jobs = options.jobs or executor.default_jobs()
    new = sum(not is_complete(run_folder(root, config)) for config in configs)
    failures = run_all(configs, root, jobs=jobs, executor=executor)
    for failure in failures:
        print(f"{failure.folder}: {failure.reason}", file=sys.stderr)
    report_study(root)
    runs = f"{len(configs)} runs" if new == len(configs) else f"{new} new of {len(configs)} runs"
    print(f"{runs}, cold starts and report: {(time.monotonic() - start) / 60:.1f} min")
    return 1 if failures else 0


def _pin_losses(study: "StudyPlan") -> "StudyPlan":
    """The study with the files of the user's own losses checked, and pinned to what they hold."""
    from moe_rl.training.run import resolve

    pinned = [config if config.loss is None else resolve(config) for config in study.configs]
    return dataclasses.replace(study, configs=tuple(pinned))


def report_study(root: Path) -> None:
    """Write the report of a study folder or run folder; print its arms and its verdicts."""
    from moe_rl.analysis import (
        claims_table,
        load_study,
        run_measures,
        summarize,
        terminal_table,
        terminal_verdicts,
        write_report,
    )

    study = load_study(root)
    measures = run_measures(study)
    page = write_report(root, study, measures)
    print(terminal_table(summarize(study, measures)))
    if study.mode != "map":  # a verdict for each of its cells would say nothing
        print(terminal_verdicts(claims_table(study, measures)))
    print(f"report: {page}")
