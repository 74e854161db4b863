"""Signals that come while this process connects to a Ray."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ray._private import utils as ray_utils


@contextmanager
def signals_later() -> Iterator[None]:
    """What is to interrupt this process while it connects to a Ray does so afterwards; a second signal does it at once.

    ``ray.init`` that is broken off halfway leaves processes for a minute, or crashes. It also puts a handler of SIGTERM of
    its own in place of the caller's, and Ray offers no argument for that; where the caller has none, Ray's is better than none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            handlers[signal.Signals(number)](number, frame)

    rays_own = ray_utils.set_sigterm_handler
    if signal.SIGTERM in handlers:
        ray_utils.set_sigterm_handler = lambda handler: None
    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = rays_own
        for number, handler in handlers.items():
            signal.signal(number, handler)  # also where Ray's core has put its own below Python's
    for first in came[:1]:
        handlers[signal.Signals(first)](first, None)
