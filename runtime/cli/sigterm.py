"""SIGTERM: what Kubernetes, Slurm and systemd send before they kill."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any


class Sigterm:
    """While it is entered, SIGTERM interrupts as Ctrl-C does, once: what comes then does not break off the leave-taking.

    It raises ``KeyboardInterrupt`` itself, and keeps what it was in ``came``: Ray makes a plain one of any kind of it.
    ``grace``: asked first, if it is there; where it says True the run is about to end by itself, and is interrupted only by the
    second signal, or after ``grace_s`` seconds.
    """

    def __init__(self) -> None:
        """None came yet."""
        self.came = self._over = False
        self.grace: Callable[[], bool] | None = None
        self.grace_s = 0.0
        self._timer: threading.Timer | None = None
        self._before: Any = None

    def __enter__(self) -> "Sigterm":
        """Take the signal over; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the signal as it was."""
        if self._timer is not None:
            self._timer.cancel()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, *_: object) -> None:
        """The signal's handler."""
        if self._over:
            return
        first, self.came = not self.came, True
        if first and self.grace is not None and self.grace():
            self._timer = threading.Timer(self.grace_s, os.kill, (os.getpid(), signal.SIGTERM))
            self._timer.daemon = True
            self._timer.start()
            return
        self._over = True
        raise KeyboardInterrupt


SIGTERM = Sigterm()  # the command line's
