"""Signals that end a training: it saves first, and says by its exit code that it can be resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Generator
from types import FrameType

SAVED = 75
"""Exit code after a cluster's signal (``EX_TEMPFAIL`` of sysexits.h: try again): everything is saved, resume."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it: everything is saved as well."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the end of a container or a job, and a cluster's warning before it."""


TWICE = 1.0
"""Seconds within which a signal is not a second one: a cluster may send it to a job and to the job's launcher."""


class Stop(BaseException):  # not an Exception: nobody on the way up may take it for a failure
    """A signal has asked the training to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.signal = number

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return INTERRUPTED if self.signal == signal.SIGINT else SAVED


class StopSignals:
    """Turns the first of :data:`SIGNALS` into :class:`Stop`; the second ends the process at once."""

    def __init__(self) -> None:
        self._deferred = False
        self.received: signal.Signals | None = None
        """The first signal so far."""
        self._at = 0.0

    @contextlib.contextmanager
    def caught(self) -> Generator[None]:
        """Handle the signals inside of this context; needs the main thread.

        After a signal, the outermost context leaves them ignored: a late copy must not change the exit code.
        """
        # What a shell has made a background job ignore stays ignored.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                restored = self.received is None or handler == self._handle
                signal.signal(number, handler if restored else signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self) -> Generator[None]:
        """Let what is inside of this context finish before :class:`Stop` is raised."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Stop(self.received)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Called between two instructions of the main thread."""
        if self.received is not None:
            if number == self.received and time.monotonic() - self._at < TWICE:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received, self._at = signal.Signals(number), time.monotonic()
        if not self._deferred:
            raise Stop(self.received)
        print(
            f"\n[m3po] {self.received.name}: finishing the iteration, then saving; the same again ends at once.",
            flush=True,
        )


def leave_signals_to_the_parent() -> None:
    """Ignore :data:`SIGNALS`: a cluster sends them to all processes of a job, and the training still needs its own."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
