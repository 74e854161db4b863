"""What a partition host is told to keep, and what it answers."""

from typing import Annotated

import msgspec


class ReplaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each partition host keeps of what devices have sent it through a frozen trunk.

    ``memory_bytes``, then ``disk_bytes``: budgets; beyond them the view that was used longest ago goes. ``lifetime``: versions
    after which a view is dropped (None: never). ``views_per_device``: a newer one takes the place of the oldest.
    """

    memory_bytes: Annotated[int, msgspec.Meta(ge=1)] = 10**9
    disk_bytes: Annotated[int, msgspec.Meta(ge=0)] = 10**10
    lifetime: Annotated[int, msgspec.Meta(ge=0)] | None = None
    views_per_device: Annotated[int, msgspec.Meta(ge=1)] = 1


class HostAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the host's leg of a split plan came to.

    ``steps``, ``loss``, ``loss_square``: as in a report. ``up_bytes``, ``down_bytes``: of each packet of the stream, in order.
    ``error``: why it did not end well. ``gone``: that is because the host has not, or no more, the view that is to be replayed.
    ``train_s``: wall seconds of computing. ``notices``: what became of views.
    """

    steps: int = 0
    loss: float | None = None
    loss_square: float | None = None
    up_bytes: list[int] = []
    down_bytes: list[int] = []
    train_s: float = 0.0
    error: str = ""
    gone: bool = False
    notices: list[str] = []
