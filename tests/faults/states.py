"""Faults of checkpoints and crash bundles."""

import json
from collections.abc import Callable
from pathlib import Path

from faults.folders import TRAIN, run_of
from faults.table import Fault
from runs import write_manifest

from moe_rl.config import load_config
from moe_rl.run_folder.checkpoints import Checkpoints

RUN = (*TRAIN, "run")


def checkpoint(
    damage: Callable[[Path], None] = lambda path: None, *, of: str = ""
) -> Callable[[Path], None]:
    """Puts a run with one checkpoint there, and then damages it."""

    def given(folder: Path) -> None:
        run = run_of(folder)
        config = load_config(str(run / "config.json"))
        identity = of or json.dumps(config.to_dict(), sort_keys=True)
        store = Checkpoints(run / "checkpoints", identity=identity)
        store.write(0, 1, lambda path: (path / "weights").write_text("1234") and None, score=0.0)
        damage(store.path(0, 1))

    return given


def newer(path: Path) -> None:
    write_manifest(path, schema=99)


def cut(path: Path) -> None:
    (path / "weights").write_text("123")


STATES = {
    "a checkpoint, and no --resume": Fault(RUN, checkpoint(), torch=True),
    "a checkpoint of another run": Fault((*RUN, "--resume"), checkpoint(of="another"), torch=True),
    "a checkpoint of a newer version": Fault((*RUN, "--resume"), checkpoint(newer), torch=True),
    "no checkpoint that is whole": Fault(
        (*RUN, "--resume"), checkpoint(cut), torch=True, writes=True
    ),
    "no crash bundle": Fault(("replay-crash", "nowhere"), torch=True),
    "a checkpoint for a crash bundle": Fault(
        ("replay-crash", "run/checkpoints/00000-01"), checkpoint(), torch=True
    ),
}
