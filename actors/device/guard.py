"""The guard of a device: is called at each stage of a plan, and limits the memory of what is carried out."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from ...policies.plan import Plan


class Guard(Protocol):
    """What a device needs of the process that it runs in."""

    enforces: bool

    def entered(self, stage: str) -> None:
        """A plan has reached a stage."""
        ...

    def limited(self, plan: Plan, held_bytes: int) -> AbstractContextManager[None]:
        """The limit under which a plan is carried out. ``held_bytes``: of the plan's model, allocated already."""
        ...


class NoGuard:
    """No limit."""

    enforces = False

    def entered(self, stage: str) -> None:
        """Nothing is to be done."""

    def limited(self, plan: Plan, held_bytes: int) -> AbstractContextManager[None]:
        """No limit."""
        return nullcontext()
