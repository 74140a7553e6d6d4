"""`moe-rl check-replay`: do record and replay hold on a model, a family or a recorded trace?"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moe_rl.commands.options import Command, TraceLayout
from moe_rl.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKS = {True: "pass", False: "FAIL", None: "-"}
NAME_WIDTH = 22


@dataclass(frozen=True, kw_only=True)
class CheckReplay(TraceLayout, Command):
    """Check that recording and replay work on a model, a model family or a recorded trace.

    Exit code 1 if a check fails.
    """

    target: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|FAMILY|TRACE")
    ] = None
    """Model folder or hub id, transformers model type (such as qwen3_moe), or file of routes."""
    all: bool = False
    """Check every MoE family of the installed transformers, on small models."""
    seed: int = 0
    """Random seed of weights, tokens and replayed expert ids."""
    num_experts: int | None = None
    """For a trace: number of experts E; every id must be below it."""

    def run(self) -> int:
        """Find out what the target is, and check it."""
        if self.all == (self.target is not None):
            raise ConfigError("check-replay: give a model folder, a family or a trace, or --all")
        import transformers

        from moe_rl.policy.folder import find_model
        from moe_rl.replay_check.families import (
            FAMILIES,
            REFUSED_FAMILIES,
            REFUSED_UNBUILT,
            family_names,
        )

        # Its advice is about missing kernels and the odd sizes of small models.
        transformers.logging.set_verbosity_error()
        if self.target is None:
            return max(self._check_families(family_names()), _check_refusals())
        path = find_model(self.target, "target")
        if (path / "config.json").is_file():
            return self._check_model(path)
        if path.exists():
            return self._check_trace(path)
        if self.target in FAMILIES or f"{self.target}_text" in FAMILIES:
            return self._check_families([self.target])
        if self.target in REFUSED_FAMILIES or self.target in REFUSED_UNBUILT:
            raise ConfigError(_refusals()[self.target])
        near = difflib.get_close_matches(self.target, family_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{self.target!r}: no model folder, no trace, and no family of the installed "
            f"transformers{hint} (--all lists the families)"
        )

    def _check_families(self, names: list[str]) -> int:
        import torch

        from moe_rl.replay_check.families import build_family

        torch.set_num_threads(1)  # at this size threads only wait for each other
        built = ((name, build_family(name, seed=self.seed)) for name in names)
        return self._check_models(built, "family", "families")

    def _check_model(self, folder: Path) -> int:
        from moe_rl.policy.folder import load_model

        model = load_model(folder, str(folder), tokenizer=False, attn_implementation="eager")
        return self._check_models([(model.config.model_type, model)], "model", "model")

    def _check_models(
        self, models: Iterable[tuple[str, "PreTrainedModel"]], kind: str, total: str
    ) -> int:
        """Check models, and print a row of marks for each with the reasons below it."""
        import transformers

        from moe_rl.replay_check.check import LAWS, check_replay
        from moe_rl.replay_check.families import formula_of

        _print_row(kind, dict.fromkeys(LAWS))
        failed = []
        for name, model in models:
            findings = check_replay(model, formula=formula_of(name), seed=self.seed)
            _print_row(name, {finding.check: MARKS[finding.passed] for finding in findings})
            for finding in findings:
                if finding.reason:
                    print(f"{'':<{NAME_WIDTH}} {finding.check}: {finding.reason}")
            failed.append(any(finding.passed is False for finding in findings))
        passed = f"{failed.count(False)} of {len(failed)} {total} pass"
        print(f"{passed} on transformers {transformers.__version__}")
        return int(any(failed))

    def _check_trace(self, path: Path) -> int:
        from moe_rl.replay_check.check_trace import check_trace

        trace = self.read(path)
        routes = trace.routed_experts
        shape = " x ".join(str(size) for size in routes.shape)
        known = float((routes >= 0).all(dim=-1).float().mean())
        print(f"{path}: {trace.source}, [B, S, L, K] = {shape}, {known:.1%} with a record")
        for note in trace.notes:
            print(f"{path}: {note}")
        findings = check_trace(
            routes, num_experts=self.num_experts, response=trace.response, tokens=trace.tokens
        )
        for finding in findings:
            line = f"{finding.check:<{NAME_WIDTH}} {MARKS[finding.passed]:<5} {finding.reason}"
            print(line.rstrip())
        return int(any(finding.passed is False for finding in findings))


def _check_refusals() -> int:
    """Make sure that families without a top-k are refused, and print the reasons."""
    refusals = _refusals()
    for name, reason in refusals.items():
        print(f"{name:<{NAME_WIDTH}} {reason or 'FAIL: not refused'}")
    return int(not all(refusals.values()))


def _refusals() -> dict[str, str]:
    """Why each family without a top-k is refused, "" where it is not."""
    from moe_rl.replay_check.families import REFUSED_FAMILIES, REFUSED_UNBUILT, build_family
    from moe_rl.routing import find_routers

    refusals = dict.fromkeys(REFUSED_FAMILIES, "")
    for name in REFUSED_FAMILIES:
        model = build_family(name)
        try:
            find_routers(model)
        except ValueError as error:
            refusals[name] = f"refused: {error}"
    return refusals | {name: f"refused: {reason}" for name, reason in REFUSED_UNBUILT.items()}


def _print_row(name: str, cells: Mapping[str, str | None]) -> None:
    """Print a cell below the name of each law; None: the name itself."""
    padded = (f"{cell or law:<{max(len(law), 4)}}" for law, cell in cells.items())
    print(f"{name:<{NAME_WIDTH}} {' '.join(padded)}".rstrip())
