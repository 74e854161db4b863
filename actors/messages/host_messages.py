"""Messages of a partition host, and a device's connection to it. Imports no torch: configuration and driver read it too."""

from typing import Annotated, Protocol

import msgspec

from ...comms.codec import Array


class ReplaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budgets of each partition host's replay buffer.

    ``memory_bytes``, then ``disk_bytes``: beyond both, the least recently used view is evicted. ``lifetime``: versions after
    which a view is dropped (None: never). ``views_per_device``: a new view beyond it replaces the device's oldest.
    """

    memory_bytes: Annotated[int, msgspec.Meta(ge=1)] = 10**9
    disk_bytes: Annotated[int, msgspec.Meta(ge=0)] = 10**10
    lifetime: Annotated[int, msgspec.Meta(ge=0)] | None = None
    views_per_device: Annotated[int, msgspec.Meta(ge=1)] = 1


class HostAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of the host's leg of a split plan.

    ``steps``, ``loss``, ``loss_square``: as in a report. ``up_bytes``, ``down_bytes``: of each packet of the stream, in order.
    ``error``: why the leg failed; empty if it succeeded. ``gone``: it failed because the host does not have the view to be
    replayed. ``train_s``: wall seconds of computing. ``notices``: views lost, one sentence each.
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


class StreamFault(Exception):
    """The host could not take a packet, or could not start the plan. One sentence says why."""


class HostLink(Protocol):
    """A device's connection to the host's leg of its plan, in the same process or through Ray."""

    def send(self, packet: Array, *, window: int) -> None:
        """Send activations; blocks while ``window`` packets are unprocessed. Raises ``StreamFault``."""
        ...

    def answer(self) -> Array:
        """Wait for the answer to the oldest unanswered packet, if the host answers at all. Raises ``StreamFault``."""
        ...

    def flush(self) -> None:
        """Wait until the host has taken all packets. Raises ``StreamFault``."""
        ...
