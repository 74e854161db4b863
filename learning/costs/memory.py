"""Bytes of live tensors while torch code runs, and what their peak would be for a batch of another size.

Every operation's results pass through a dispatch mode; a storage counts once, from the operation that made it until nothing
refers to it, autograd's saved tensors included. What operations need inside themselves (oneDNN's scratch and reordered
copies) is not seen: measured processes need 1.5 to 2 times the figure (ProFL's specification, sec. 9), so it orders plans and
bounds them from below; whether a device really has the memory is found by running under the limit.

A step on two samples and one on four make and free the same storages in the same order, and each storage grows with the batch
by a law that its two sizes tell: not at all, in proportion, or with a power. So the peak of any batch follows without a run.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The storages made inside the mode, or handed to ``add``, in order: ``sizes`` in bytes, and ``events``.

    An event is the number of the storage that was made, or, negative, ``~number`` of one that is gone.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        """Nothing is live yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.events: list[int] = []
        self._references: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler at the first operation, which takes longer than all the rest."""
        return False

    def add(self, tensors: Iterable[Any]) -> None:
        """Count tensors that exist already; what is not a tensor is passed over, and so is what is counted already."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_sparse:
                self.add([tensor._indices(), tensor._values()])
                continue
            storage = tensor.untyped_storage()
            key = id(storage)  # torch keeps one Python object per storage while that lives
            if key not in self._references:
                number = self.reserve(storage.nbytes())
                self._references[key] = weakref.ref(storage, partial(self._gone, key, number))

    def reserve(self, num_bytes: int) -> int:
        """Count bytes as if a storage had been made; its number, for ``release``."""
        self.sizes.append(num_bytes)
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def release(self, number: int) -> None:
        """A storage is gone."""
        self.events.append(~number)

    def _gone(self, key: int, number: int, _: Any) -> None:
        del self._references[key]
        self.release(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result

    @property
    def live_bytes(self) -> int:
        """Bytes that are live now."""
        return sum(self.sizes[event] if event >= 0 else -self.sizes[~event] for event in self.events)

    @property
    def peak_bytes(self) -> int:
        """The most that were live at once."""
        return peak_bytes(self.events, self.sizes)


def peak_bytes(events: Iterable[int], sizes: list[int]) -> int:
    """The most bytes that are live at once, over events of storages of these sizes."""
    live = peak = 0
    for event in events:
        if event >= 0:
            live += sizes[event]
            peak = max(peak, live)
        else:
            live -= sizes[~event]
    return peak


def peak_of_batch(small: Allocations, large: Allocations, batch: int) -> int:
    """The peak of a step on ``batch`` samples, from one on two and one on four.

    Where the two did not do the same (code that branches on values), their peaks are continued in a straight line.
    """
    if small.events != large.events:
        return _scaled(small.peak_bytes, large.peak_bytes, batch)
    sizes = [_scaled(two, four, batch) for two, four in zip(small.sizes, large.sizes, strict=True)]
    return peak_bytes(large.events, sizes)


def _scaled(two: int, four: int, batch: int) -> int:
    """What takes ``two`` bytes with two samples and ``four`` with four."""
    for power in (2, 3):  # all pairs of samples, all triples; a sum of laws is taken as a straight line
        if two and four == 2**power * two:
            return two * batch**power // 2**power
    return two + (four - two) * (batch - 2) // 2
