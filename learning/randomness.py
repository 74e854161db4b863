"""What a process has once, torch's CPU generator and its number of threads: borrowed and given back.

Dropout and initialisers take no generator argument, so the shared one is the only way to seed them. ``torch.manual_seed`` is
not used for it: it also queues a seed, with a stack trace, for every accelerator that is not in use, at each call.

One lock guards both, so that two runs in threads of one process do not draw from each other's seeds, nor compute with each
other's threads: while one computes, the other waits.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SHARED = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread, as every worker does, and no other run of this process computes."""
    with _SHARED:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, torch's CPU randomness may be drawn from or seeded; afterwards it goes on from where it was."""
    generator = torch.default_generator
    with _SHARED:
        before = generator.get_state()
        try:
            yield
        finally:
            generator.set_state(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU randomness follows from ``seed``; afterwards it goes on from where it was."""
    with undisturbed():
        torch.default_generator.manual_seed(seed)
        yield


class RandomStream:
    """A stream of torch's CPU randomness of its own, taken up and left again any number of times."""

    def __init__(self, seed: int) -> None:
        """At its start."""
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, torch's shared generator goes on with this stream; afterwards from where it was."""
        generator = torch.default_generator
        with undisturbed():
            generator.set_state(self._state)
            try:
                yield
            finally:
                self._state = generator.get_state()
