"""Context managers for two global settings of a process: torch's CPU random generator and its number of threads.

Dropout and initialisers take no generator argument, so they can only be seeded by the global generator. ``torch.manual_seed``
is not used: at each call it also queues a seed, with a stack trace, for every accelerator that is not in use.

One lock guards both settings. Two runs in threads of one process therefore compute in turn, and do not affect each other's
random numbers or number of threads.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use so many torch threads, and hold the lock; the number of threads is restored afterwards."""
    with _LOCK:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the state of torch's CPU generator afterwards."""
    generator = torch.default_generator
    with _LOCK:
        before = generator.get_state()
        try:
            yield
        finally:
            generator.set_state(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator; its previous state is restored afterwards."""
    with preserved_rng():
        torch.default_generator.manual_seed(seed)
        yield


class RandomStream:
    """A random stream of its own for torch's CPU generator, which can be entered and left any number of times."""

    def __init__(self, seed: int) -> None:
        """Start the stream from ``seed``."""
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the global generator continue this stream; its previous state is restored afterwards."""
        generator = torch.default_generator
        with preserved_rng():
            generator.set_state(self._state)
            try:
                yield
            finally:
                self._state = generator.get_state()
