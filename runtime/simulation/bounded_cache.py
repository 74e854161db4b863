"""A mapping that keeps what was put into it last: for what can be worked out again."""

from collections import OrderedDict
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class BoundedCache(OrderedDict[Key, Value]):
    """At most so many entries; the one that was put first goes first."""

    def __init__(self, most: int) -> None:
        """Empty."""
        super().__init__()
        self._most = most

    def __setitem__(self, key: Key, value: Value) -> None:
        """Put an entry."""
        super().__setitem__(key, value)
        if len(self) > self._most:
            self.popitem(last=False)
