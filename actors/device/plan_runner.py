"""What carries out plans: a device in this process or in a child, with a memory or without. Imports neither Ray nor torch."""

from collections.abc import Sequence
from typing import Protocol

from ...comms.codec import Array
from ...comms.links.state import LinkState
from ..messages.host_messages import HostLink

Result = tuple[bytes, Array | None, LinkState | None]


class PlanRunner(Protocol):
    """Carries out plans: a ``Device`` in this process, or one in a child."""

    def run(
        self, plan_bytes: bytes, packets: Sequence[Array], state: LinkState | None = None, host: HostLink | None = None
    ) -> Result:
        """Carry out one plan."""
        ...

    def warm_up(self, *, model: bool = True) -> None:
        """Load data and model now."""
        ...

    def time_steps(self, messages: Sequence[bytes]) -> list[float | None]:
        """Seconds of a training step of each of these plans; None for one that fails."""
        ...

    def close(self) -> None:
        """End its process, if it has one of its own."""
        ...
