"""Weights & Biases, offline: files under RUN/wandb, nothing on the network.

    wandb sync RUN/wandb/offline-run-*      to send them, when you choose to

WANDB_MODE in the environment says otherwise (online, shared, disabled); WANDB_PROJECT names the
project. Lines are placed by `rollout_step` and `update_step`, not by the number of the call. NaN
and infinities are logged as they are. A backend that cannot delete: a run that goes on leaves out
the lines which an earlier attempt has logged, and which are the same.
"""

import os
from collections.abc import Mapping
from typing import Any

from moe_rl.run_folder.trackers.base import Axis, TrackedRun, take_place
from moe_rl.runtime.extras import import_extra

PROJECT = "moe-rl"
X: dict[Axis, str] = {"step": "rollout_step", "update": "update_step"}
_OFFLINE = "offline"


class WandbTracker:
    """Logs to a Weights & Biases run of its own.

    Raises:
        ConfigError: the package is not installed.
    """

    name = "wandb"

    def __init__(self) -> None:
        self._mode = os.environ.get("WANDB_MODE", _OFFLINE)
        if self._mode == _OFFLINE:
            # Read when the package is imported: its crash reports would go out offline too.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        option = f"tracker={self.name!r}"
        self._wandb = import_extra("wandb", extra="wandb", option=option)
        mailbox = import_extra("wandb.sdk.mailbox", extra="wandb", option=option)
        # The last two: its service, a process of its own, has died.
        self.errors: tuple[type[Exception], ...] = (
            self._wandb.Error,
            mailbox.MailboxClosedError,
            mailbox.HandleAbandonedError,
        )
        self._run: Any = None
        self._shown: Mapping[Axis, int] = {}
        self._defined: set[str] = set()

    def start(self, run: TrackedRun) -> None:
        """Begin the run, or go on with it under its id."""
        place = take_place(run, self.name)
        self._shown = place.shown
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=place.id,
            # Offline it only warns that it cannot look; the id alone joins the parts.
            resume="allow" if place.goes_on and self._mode != _OFFLINE else None,
            dir=str(run.folder),
            config=dict(run.config),
            mode=self._mode,
            reinit="create_new",  # a run that the caller has open stays open
            # Our progress display is nobody's log, and says where the run is already.
            settings=self._wandb.Settings(console="off", silent=True),
        )
        for x in X.values():
            self._run.define_metric(x, hidden=True)

    def log(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        """Log one row of history."""
        if x < self._shown[axis]:
            return
        # By name: a pattern for all others would match `update/*` too, and each row would repeat
        # the x of the other axis.
        for name in values.keys() - self._defined:
            self._run.define_metric(name, step_metric=X[axis])
        self._defined |= values.keys()
        self._run.log({X[axis]: x, **values})

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Write the summary and let go of the run."""
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)
