"""`moe-rl check-replay`: the checker of record and replay as a table with an exit code."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_rl.config import ConfigError
from moe_rl.policy.loading import load_model
from moe_rl.replay_check.check import LAWS, Finding, check_replay
from moe_rl.replay_check.check_trace import check_trace
from moe_rl.replay_check.families import (
    FAMILIES,
    REFUSED_FAMILIES,
    REFUSED_UNBUILT,
    build_family,
    family_names,
    family_of,
)
from moe_rl.routing import find_routers
from moe_rl.traces.files import read_trace

MARKS = {True: "pass", False: "FAIL", None: "-"}
NAME_WIDTH = 22


def check_families(names: list[str], *, seed: int) -> int:
    """Check families on small models, print a row each, return the exit code."""
    torch.set_num_threads(1)  # at this size threads only wait for each other
    print(_row("family", [*LAWS]))
    failures = 0
    for name in names:
        family = family_of(name)
        model = build_family(name, seed=seed)
        findings = check_replay(model, formula=family.formula if family else None, seed=seed)
        failures += _print_findings(name, findings)
    return _conclude(failures, len(names), "families")


def check_refusals() -> int:
    """Make sure that families without a top-k are refused, and print the reasons."""
    silent = 0
    for name, reason in refusals():
        print(f"{name:<{NAME_WIDTH}} {reason or 'FAIL: not refused'}")
        silent += not reason
    return 1 if silent else 0


def refusals() -> Iterator[tuple[str, str]]:
    """(family, why it is refused), "" where it is not."""
    for name in REFUSED_FAMILIES:
        try:
            find_routers(build_family(name))
        except ValueError as error:
            yield name, f"refused: {str(error).partition('replayed: ')[2]}"
        else:
            yield name, ""
    for name, reason in REFUSED_UNBUILT.items():
        yield name, f"refused: {reason}"


def check_model(folder: Path, *, seed: int) -> int:
    """Check the model of a Hugging Face folder, print a row, return the exit code."""
    model = load_model(folder, str(folder), tokenizer=False, attn_implementation="eager")
    config: Any = model.config
    family = family_of(config.model_type)
    findings = check_replay(model, formula=family.formula if family else None, seed=seed)
    print(_row("model", [*LAWS]))
    return _conclude(_print_findings(config.model_type, findings), 1, "model")


def check_file(path: Path, *, num_experts: int | None, **layout: Any) -> int:
    """Check a recorded trace, print a line a check, return the exit code."""
    trace = read_trace(path, **layout)
    routes = trace.routed_experts
    shape = " x ".join(str(size) for size in routes.shape)
    known = float((routes >= 0).all(dim=-1).float().mean())
    print(f"{path}: {trace.source}, [B, S, L, K] = {shape}, {known:.1%} with a record")
    failures = 0
    for finding in check_trace(routes, num_experts=num_experts):
        print(f"{finding.check:<{NAME_WIDTH}} {MARKS[finding.passed]:<5} {finding.reason}".rstrip())
        failures += finding.passed is False
    return 1 if failures else 0


def check_target(target: str | None, *, everything: bool, seed: int, **trace: Any) -> int:
    """A family's name, a model's folder, a trace, or all families: check it, return the exit code.

    Raises:
        ConfigError: none of these, or none given.
    """
    if everything == (target is not None):
        raise ConfigError("check-replay: name a family, a model folder or a trace, or give --all")
    # Its advice is about missing kernels and the odd sizes of small models.
    transformers.logging.set_verbosity_error()
    if target is None:
        return max(check_families(family_names(), seed=seed), check_refusals())
    path = Path(target)
    if (path / "config.json").is_file():
        return check_model(path, seed=seed)
    if path.exists():
        return check_file(path, **trace)
    if target in FAMILIES or f"{target}_text" in FAMILIES:
        return check_families([target], seed=seed)
    if target in REFUSED_FAMILIES or target in REFUSED_UNBUILT:
        raise ConfigError(dict(refusals())[target])
    near = difflib.get_close_matches(target, family_names(), n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{target!r} is no family of the installed transformers, no model folder and no trace"
        f"{hint}; check-replay --all lists the families"
    )


def _print_findings(name: str, findings: list[Finding]) -> int:
    print(_row(name, [MARKS[finding.passed] for finding in findings]))
    for finding in findings:
        if finding.reason:
            print(f"{'':<{NAME_WIDTH}} {finding.check}: {finding.reason}")
    return any(finding.passed is False for finding in findings)


def _row(name: str, cells: list[str]) -> str:
    widths = [max(len(law), 4) for law in LAWS]
    padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{name:<{NAME_WIDTH}} {' '.join(padded)}".rstrip()


def _conclude(failures: int, total: int, what: str) -> int:
    version = transformers.__version__
    print(f"{total - failures} of {total} {what} pass on transformers {version}")
    return 1 if failures else 0
