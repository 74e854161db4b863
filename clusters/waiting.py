"""Waiting that says what for: a sentence when it takes longer than a moment, and again from time to time."""

import time
from collections.abc import Callable, Iterator

FIRST_S, EVERY_S = 20.0, 30.0


def waiting(done: Callable[[], bool], told: Callable[[], str]) -> Iterator[str]:
    """Call ``done`` until it says True; it takes its time by itself. Yields what ``told`` says, where it is new and not ""."""
    due, last = time.monotonic() + FIRST_S, ""
    while not done():
        if time.monotonic() >= due:
            due = time.monotonic() + EVERY_S
            if (text := told()) not in ("", last):
                last = text
                yield text
