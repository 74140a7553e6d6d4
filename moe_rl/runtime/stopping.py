"""What ends a run from outside: SIGTERM, Ctrl-C, or the failure of a process it trains with.

At a signal the run ends its rollout step, writes a checkpoint, and says how to resume. The first
signal sets a flag that the trainer looks at between two steps; the second ends the run at once. The
exit code is 128 plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# Ctrl-C reaches a process of torchrun twice: from the terminal, and from torchrun.
_SECOND_AFTER = 1.0


class Stopped(Exception):
    """The signal `number` has ended a run, which can be resumed from the folder `checkpoint`."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; checkpoint: {checkpoint}")
        self.number = number


class PeerFailed(RuntimeError):
    """Another process has failed, and said why itself."""


class StopRequest:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal; 0: none has come."""
        self._first = 0.0

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if not self.number:
            self.number, self._first = number, now
            name = signal.Signals(number).name
            # A print may be what was interrupted, and would complain about coming twice.
            os.write(2, f"{name}: this rollout step ends first; once more ends it now\n".encode())
        elif now - self._first >= _SECOND_AFTER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def listen() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT for the length of a block; only a main thread can."""
    request = StopRequest()
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    previous = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
