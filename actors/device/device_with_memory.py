"""A device that keeps its end of the link itself, as a real one does. The state of a link is several models large.

Imports neither Ray nor torch.
"""

from collections.abc import Sequence

from ...comms.codec import Array
from ...comms.links.state import LinkState, copy_state
from ..messages.host_messages import HostLink
from .plan_runner import PlanRunner, Result


class DeviceWithMemory:
    """Runs the plans of one device, whose state neither comes with a plan nor leaves with a report.

    If the report of a plan is lost, the two ends differ: the next packets build on another state than the device's, and the
    link is resynchronised.
    """

    def __init__(self, device: PlanRunner) -> None:
        """It holds no model. ``device``: carries out the plans, and returns whole states."""
        self._device = device
        self._state: LinkState | None = None

    def run(
        self, plan_bytes: bytes, packets: Sequence[Array], state: LinkState | None = None, host: HostLink | None = None
    ) -> Result:
        """Carry out one plan with its own state; see ``Device.run``. ``state`` is not used, and the state returned is None."""
        answer, update, changed = self._device.run(plan_bytes, packets, self._state, host)
        if changed is not None:  # views would keep the packets of the plan in the object store
            self._state = copy_state(changed)
        return answer, update, None

    def warm_up(self, *, model: bool = True) -> None:
        """Load data and model now."""
        self._device.warm_up(model=model)

    def time_steps(self, messages: Sequence[bytes]) -> list[float | None]:
        """Seconds of a training step of each of these plans; None for one that fails."""
        return self._device.time_steps(messages)

    def close(self) -> None:
        """End its process, if it has one of its own."""
        self._device.close()
