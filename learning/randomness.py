"""Torch's shared CPU generator, borrowed and given back.

Dropout and initialisers take no generator argument, so the shared one is the only way to seed them. ``torch.manual_seed`` is
not used for it: it also queues a seed, with a stack trace, for every accelerator that is not in use, at each call.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU randomness follows from ``seed``; afterwards it goes on from where it was."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


class Stream:
    """A stream of torch's CPU randomness of its own, taken up and left again any number of times."""

    def __init__(self, seed: int) -> None:
        """At its start."""
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Inside, torch's shared generator goes on with this stream; afterwards from where it was."""
        generator = torch.default_generator
        before = generator.get_state()
        generator.set_state(self._state)
        try:
            yield
        finally:
            self._state = generator.get_state()
            generator.set_state(before)
