"""How the command line ends: exit codes, one sentence for each error, and SIGTERM.

Exit codes: 0 done, 1 the run failed, 2 a user's mistake, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import typer

from ..errors import FedbonsaiError

INTERRUPTED, TERMINATED = 130, 143
# Typer bundles click from 0.26 on, or uses the installed one: take the class from what it exports.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class Sigterm:
    """A context in which SIGTERM, which Kubernetes, Slurm and systemd send before they kill, interrupts as Ctrl-C does.

    The first signal raises ``KeyboardInterrupt``; later ones are ignored, so that they do not abort the clean-up.
    ``received``: whether SIGTERM came and not Ctrl-C; an exception class of its own would not survive Ray, which raises a plain
    ``KeyboardInterrupt``. ``grace``: called first, if set. If it returns True, the run is about to end by itself, and is
    interrupted only by a second signal or after ``grace_s`` seconds.
    """

    def __init__(self) -> None:
        """No signal was received yet."""
        self.received = self._interrupted = False
        self.grace: Callable[[], bool] | None = None
        self.grace_s = 0.0
        self._timer: threading.Timer | None = None
        self._previous: Any = None

    def __enter__(self) -> "Sigterm":
        """Install the handler; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handler."""
        if self._timer is not None:
            self._timer.cancel()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _interrupt(self, *_: object) -> None:
        """The signal's handler."""
        if self._interrupted:
            return
        first, self.received = not self.received, True
        if first and self.grace is not None and self.grace():
            self._timer = threading.Timer(self.grace_s, os.kill, (os.getpid(), signal.SIGTERM))
            self._timer.daemon = True
            self._timer.start()
            return
        self._interrupted = True
        raise KeyboardInterrupt


def exit_code_of(call: Callable[[], Any]) -> int:
    """Call, and turn an exception into a sentence on standard error and an exit code. Bugs are raised."""
    try:
        result = call()
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except FedbonsaiError as error:
        if os.environ.get("FEDBONSAI_TRACEBACK"):
            traceback.print_exc()
        elif trace := getattr(error, "trace", ""):
            print(trace, file=sys.stderr, end="")
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if result == INTERRUPTED:  # how Typer reports Ctrl-C, from 0.20 on
        print("interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0
