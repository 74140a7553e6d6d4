"""`moe-rl inspect PATH`: what one recorded batch of any trainer says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from moe_rl.commands.options import Command
from moe_rl.config import ConfigError
from moe_rl.metrics.names import Dialect, rename


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Measure one recorded batch of another trainer or engine, and say what stands out.

    Exit code 1 if something in it is wrong.
    """

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Batch of ours or verl's plugin (.safetensors, .npz, or a folder: its last batch), prime-rl's
    token exports (.jsonl or their folder), NeMo-RL's training data (.jsonl), responses of vLLM or
    SGLang with routes, or TRL's output folder."""
    num_experts: int | None = None
    """Number of experts E; every id must be below it."""
    names: Dialect | None = None
    """Print the metrics too, under the names of this trainer. Default: they stand on the page
    alone, under ours."""
    beside: tuple[Path, ...] = ()
    """Folders (`--out`) of other inspections, to draw this one beside them: engine against trainer,
    and the tails of their ratio."""
    out: Path = Path("runs/inspect")
    """Folder for inspection.json, index.html and figures."""

    def run(self) -> int:
        """Print what stands out, write the page."""
        from moe_rl.analysis.report.inspection_page import write_inspection_page
        from moe_rl.recorded import inspect_batch, read_batch
        from moe_rl.recorded.findings import findings
        from moe_rl.recorded.inspection import to_json
        from moe_rl.recorded.trl_log import find_state, inspect_log
        from moe_rl.run_folder.log import check_can_be_made, write_json

        check_can_be_made(self.out, "out")
        if self.num_experts is not None and self.num_experts < 1:
            raise ConfigError(f"num_experts={self.num_experts}: give 1 or more")
        beside = _others(self.beside, self.out)
        state = find_state(self.path)
        if state is None:
            found = inspect_batch(read_batch(self.path), num_experts=self.num_experts)
        else:
            found = inspect_log(state)
        if beside and not found.scatter:
            raise ConfigError(
                f"{self.path}: no log-probs of engine and trainer to draw beside others"
            )
        said = findings(found)
        size = f"{found.sequences} sequences, {found.tokens} response tokens, "
        print(
            f"{self.path}: {found.source}, {size if found.tokens else ''}{', '.join(found.holds)}"
        )
        for note in found.notes:
            print(f"note: {note}")
        if self.names is not None:
            found.metrics = rename(found.metrics, self.names)
            for name, value in found.metrics.items():
                print(f"{name:<32} {value:.6g}")
        for level, words in said:
            print(f"{level}: {words}")
        self.out.mkdir(parents=True, exist_ok=True)
        told = to_json(found) | {"findings": [one._asdict() for one in said]}
        write_json(self.out / "inspection.json", told)
        page = write_inspection_page(self.out, told, name=str(self.path), beside=beside)
        print(f"page: {page}")
        return int(any(level == "wrong" for level, _ in said))


def _others(folders: tuple[Path, ...], out: Path) -> dict[str, dict[str, Any]]:
    """What the inspections in `folders` hold, by folder name, which the figure shows.

    Raises:
        ConfigError: one that holds no engine against trainer, two of one name, or too many.
    """
    from moe_rl.analysis.plots.inspection import MOST_BESIDE
    from moe_rl.recorded.inspection import SCHEMA

    names = [folder.name for folder in (*folders, out)]
    if folders and (len(set(names)) < len(names) or len(names) > MOST_BESIDE):
        raise ConfigError(
            f"beside={' '.join(map(str, folders))}: give up to {MOST_BESIDE - 1} folders whose "
            f"names differ from each other and from that of out={out}"
        )
    found = {}
    for folder in folders:
        try:
            told = json.loads((folder / "inspection.json").read_text(encoding="utf-8"))
            usable = told["schema"] == SCHEMA and told["scatter"] and told["pairs"]
        except (OSError, ValueError, LookupError, TypeError):
            usable = False
        if not usable:
            raise ConfigError(
                f"beside={folder}: no inspection of engine and trainer in it; give the --out of "
                "another moe-rl inspect"
            )
        found[folder.name] = told
    return found
