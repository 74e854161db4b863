"""Bytes of live tensors while torch code runs, and their peak for a batch of another size.

A dispatch mode sees the results of every operation. A storage counts once, from the operation that allocated it until nothing
refers to it, autograd's saved tensors included. Memory that operations use internally (oneDNN's scratch and reordered copies)
is not seen, so the peak of tensors orders plans, and is a lower bound. What operations use inside is recorded beside it, as
scratch storages that live for one operation (``workspace``); the peak with them is that of a process on this kind of machine.

A step on two samples and one on four allocate and free the same storages in the same order. How a storage grows with the batch
follows from its two sizes: not at all, in proportion, or with a power. So the peak of any batch size follows without a run.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .workspace import kernel, predicted_bytes, scratch_bytes


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the storages allocated inside the mode, or passed to ``add``: ``sizes`` in bytes, and ``events`` in order.

    An event is the number of a storage that was allocated, or the negative ``~number`` of one that was freed.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        """Start without any storage."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.scratch: set[int] = set()  # storages that an operation needs inside itself
        self.kernels: set[Any] = set()  # operations for which code is compiled, each with its shapes
        self._references: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: otherwise torch imports its compiler at the first operation, which takes longer than all the rest."""
        return False

    def add(self, tensors: Iterable[Any]) -> None:
        """Count existing tensors. Other objects, and storages that are counted already, are ignored."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_sparse:
                self.add([tensor._indices(), tensor._values()])
                continue
            storage = tensor.untyped_storage()
            key = id(storage)  # torch keeps one Python object per storage as long as that object lives
            if key not in self._references:
                number = self.reserve(storage.nbytes())
                self._references[key] = weakref.ref(storage, partial(self._on_freed, key, number))

    def reserve(self, num_bytes: int) -> int:
        """Count bytes as if a storage had been allocated; returns its number, for ``release``."""
        self.sizes.append(num_bytes)
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def release(self, number: int) -> None:
        """Record that a storage was freed."""
        self.events.append(~number)

    def _on_freed(self, key: int, number: int, _: Any) -> None:
        del self._references[key]
        self.release(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its results."""
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        for num_bytes in scratch_bytes(func, args, result):
            self.kernels.add(kernel(func, args))
            number = self.reserve(num_bytes)
            self.scratch.add(number)
            self.release(number)
        return result

    @property
    def live_bytes(self) -> int:
        """Bytes that are currently live."""
        sizes = self.counted(scratch=False)
        return sum(sizes[event] if event >= 0 else -sizes[~event] for event in self.events)

    @property
    def peak_bytes(self) -> int:
        """The most bytes of tensors that were live at the same time."""
        return peak_bytes(self.events, self.counted(scratch=False))

    def counted(self, *, scratch: bool) -> list[int]:
        """The sizes; those of scratch storages are 0 unless ``scratch``."""
        return [0 if number in self.scratch and not scratch else size for number, size in enumerate(self.sizes)]


def peak_bytes(events: Iterable[int], sizes: list[int]) -> int:
    """The most bytes live at the same time, given events and sizes of storages."""
    live = peak = 0
    for event in events:
        if event >= 0:
            live += sizes[event]
            peak = max(peak, live)
        else:
            live -= sizes[~event]
    return peak


def process_bytes(small: Allocations, large: Allocations, batch: int) -> int:
    """What a process needs for a step on ``batch`` samples, above an idle one: the peak with scratch, corrected by the fit."""
    return predicted_bytes(peak_of_batch(small, large, batch, scratch=True), num_kernels=len(large.kernels))


def peak_of_batch(small: Allocations, large: Allocations, batch: int, *, scratch: bool = False) -> int:
    """Peak of a step on ``batch`` samples, from a step on two samples and one on four.

    ``scratch``: whether what operations use inside is counted. If the two steps differ in their events (code that
    branches on values), their peaks are extrapolated linearly.
    """
    if small.events != large.events:
        peaks = [peak_bytes(step.events, step.counted(scratch=scratch)) for step in (small, large)]
        return _scaled(peaks[0], peaks[1], batch)
    pairs = zip(small.counted(scratch=scratch), large.counted(scratch=scratch), strict=True)
    sizes = [_scaled(two, four, batch) for two, four in pairs]
    return peak_bytes(large.events, sizes)


def _scaled(two: int, four: int, batch: int) -> int:
    """Bytes with ``batch`` samples of a storage that has ``two`` bytes with two samples and ``four`` with four."""
    for power in (2, 3):  # all pairs of samples, all triples; anything else is extrapolated linearly
        if two and four == 2**power * two:
            return two * batch**power // 2**power
    return two + (four - two) * (batch - 2) // 2
