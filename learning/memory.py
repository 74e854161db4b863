"""Bytes of live tensors, and their peak, while torch code runs; with fake tensors, without allocating any of them.

Every operation's results pass through a dispatch mode; a storage counts once, from the operation that made it until nothing
refers to it, autograd's saved tensors included. What operations need inside themselves (oneDNN's scratch and reordered
copies) is not seen: measured processes need 1.5 to 2 times the figure (ProFL's specification, sec. 9), so it orders plans and
bounds them from below; whether a device really has the memory is found by running under the limit.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``live_bytes`` now and ``peak_bytes`` so far of the storages made inside the mode, or handed to ``add``."""

    def __init__(self) -> None:
        """Nothing is live yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Any]) -> None:
        """Count tensors that exist already; what is not a tensor is passed over, and so is what is counted already."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_sparse:
                self.add([tensor._indices(), tensor._values()])
                continue
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()  # torch keeps one Python object per storage while that lives
            if key not in self._references:
                self._references[key] = weakref.ref(storage, partial(self._gone, key, size))
                self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._references[key]
        self.live_bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result
