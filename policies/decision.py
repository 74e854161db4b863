"""The answer of a policy: plans, the devices left out with the reasons, tasks for the server, and when the version closes."""

import msgspec

from ..learning.parts.part import Part
from .plan import Plan
from .tasks import ServerTask


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one view.

    ``plans``: one for each chosen device. ``left_out``: (device, reason) of the devices that a policy ruled out. ``close_at``:
    number of folded updates at which the version closes (None: when no plan of it is outstanding). ``close_after_s``: deadline
    in seconds after the version's first plan was dispatched. ``keep_open``: the version stays open although none of its plans
    is outstanding, because more plans will follow; it is valid until the next decision. ``close_at`` 0: the version closes at
    once, after its tasks; such a decision has tasks and no plans. ``path``: the part that stands for the model from now on
    (None: as before, at first the whole model): it is what is evaluated, and updates of blocks and proxies that it does not
    train are late. The first policy of a chain receives the empty decision.
    """

    plans: tuple[Plan, ...] = ()
    left_out: tuple[tuple[int, str], ...] = ()
    tasks: tuple[ServerTask, ...] = ()
    close_at: int | None = None
    close_after_s: float | None = None
    keep_open: bool = False
    path: Part | None = None

    @property
    def empty(self) -> bool:
        """Whether it holds neither plans nor tasks."""
        return not self.plans and not self.tasks
