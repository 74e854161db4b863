"""A ``Device`` that runs in a child process, under the memory budget of each plan. Imports neither Ray nor torch.

    how the child answers a plan            outcome              what happens to the child
    report                                  that of the report   kept
    report of an allocation that failed     out_of_memory        replaced
    it dies, and the plan has a limit       out_of_memory        replaced
    it dies, and the plan has none          tried again twice,   replaced
                                            then lost

A death under a limit counts as lack of memory whatever its signal: native code that does not get memory aborts or faults, and
the system's out-of-memory killer uses the same SIGKILL as anybody else.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ...comms.codec import Array
from ...comms.links.state import LinkState
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ...policies.report import Answer, Measured, Outcome
from ..device.plan_runner import PlanRunner, Result
from ..messages.host_messages import HostLink, StreamFault
from ..messages.plan_message import read_plan
from .child_process import ChildDied, ChildProcess
from .data_segment import limit_obstacle

if TYPE_CHECKING:
    from ...learning.workload import Workload

_MAX_ATTEMPTS = 3


def make_device(
    settings: WorkloadSettings,
    *,
    enforce: bool,
    whole_states: bool = False,
    workload: "Workload | None" = None,
    obstacle: Callable[[], str] = limit_obstacle,
) -> PlanRunner:
    """A device in a child under limits, if ``enforce`` and this system has them; else in this process.

    ``whole_states``: see ``Device``. ``workload``: of these settings, for a device in this process (None: one of its own).
    ``obstacle``: why this system has no limits; "" if it has.
    """
    if enforce and not obstacle():
        return EnforcedDevice(settings, whole_states=whole_states)
    from ...learning.workload import Workload  # here, since it imports torch
    from ..device.device import Device

    return Device(workload or Workload(settings), whole_states=whole_states)


class EnforcedDevice:
    """Runs plans in a child process, which is replaced when it has died or run out of memory."""

    def __init__(self, settings: WorkloadSettings, *, whole_states: bool = False) -> None:
        """The child is started by ``warm_up``, or at the first plan. ``whole_states``: see ``Device``."""
        self._settings, self._whole_states = settings, whole_states
        self._child: ChildProcess | None = None
        self._loads_model = True

    @property
    def pid(self) -> int | None:
        """Process id of the child, if one was started."""
        return self._child.pid if self._child is not None else None

    def warm_up(self, *, model: bool = True) -> None:
        """Start the child, which loads data and model; raises what it could not load."""
        self._loads_model = model
        self._started()

    def run(
        self, plan_bytes: bytes, packets: Sequence[Array], state: LinkState | None = None, host: HostLink | None = None
    ) -> Result:
        """Carry out one plan in the child; see ``Device.run``."""
        plan, started = read_plan(plan_bytes), time.perf_counter()
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            stage = _Stage()
            try:
                result = self._run(plan_bytes, packets, state, host, stage)
            except ChildDied as death:
                self._replace()
                limited = plan.memory_bytes is not None and stage.begun
                if limited or (host is not None and stage.begun) or attempt == _MAX_ATTEMPTS:
                    answer = _death(plan, stage.name, str(death), limited=limited, wall_s=time.perf_counter() - started)
                    return answer, None, None
            except BaseException:  # of the host's link: the child is in the middle of the plan
                self.close()
                raise
            else:
                if msgspec.msgpack.decode(result[0], type=Answer).outcome == Outcome.OUT_OF_MEMORY:
                    self._replace()  # what a failed allocation leaves behind is not known
                return result
        raise AssertionError("the last attempt returns")

    def try_limit(self, plan_bytes: bytes, limit: int) -> bool:
        """Whether two steps of a plan fit ``limit`` bytes above the idle trainer. Raises ``RuntimeError`` for other errors."""
        child = self._started()
        child.send({"kind": "try", "plan": plan_bytes, "limit": limit})
        while True:
            header, _ = child.receive()
            if header["kind"] == "error":
                raise RuntimeError(header["text"])
            if header["kind"] == "tried":
                break
        return bool(header["fits"])

    def time_steps(self, messages: Sequence[bytes]) -> list[float | None]:
        """Have the child time training steps, without a limit; see ``Device.time_steps``. Raises ``RuntimeError``.

        A child that dies fails all of them.
        """
        try:
            child = self._started()
            child.send({"kind": "time", "plans": list(messages)})
            header, _ = child.receive()
        except ChildDied:
            self._replace()
            return [None] * len(messages)
        seconds: list[float | None] = header["seconds"]
        return seconds

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _started(self) -> ChildProcess:
        """The child, ready."""
        if self._child is not None and self._child.has_ended:  # between two plans: neither of them is to blame
            self.close()
        if self._child is None:
            self._child = ChildProcess(self._settings, model=self._loads_model, whole_states=self._whole_states)
        try:
            self._child.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self._child

    def _replace(self) -> None:
        """End the child and start another one, which loads while the worker goes on."""
        self.close()
        self._child = ChildProcess(self._settings, model=self._loads_model, whole_states=self._whole_states)

    def _run(
        self,
        plan_bytes: bytes,
        packets: Sequence[Array],
        state: LinkState | None,
        host: HostLink | None,
        stage: "_Stage",
    ) -> Result:
        """One attempt. Raises ``ChildDied``."""
        child = self._started()
        names = None if state is None else list(state)
        request = {"kind": "run", "plan": plan_bytes, "packets": len(packets), "state": names, "host": host is not None}
        stage.begun = True
        child.send(request, [*packets, *(state or {}).values()])
        while True:
            header, arrays = child.receive()
            if header["kind"] == "stage":
                stage.name = header["stage"]
            elif header["kind"] == "host":
                assert host is not None
                _relay(child, host, header, arrays)
            else:
                break
        update = arrays.pop(0) if header["update"] else None
        new_state = None if header["state"] is None else dict(zip(header["state"], arrays, strict=True))
        return bytes(header["report"]), update, new_state


class _Stage:
    """The stage that a plan has reached in the child, and whether it was sent there at all."""

    name = "open"
    begun = False


def _relay(child: ChildProcess, host: HostLink, header: dict[str, Any], arrays: list[Array]) -> None:
    """Forward a request of the child to its plan's host, and send the answer back."""
    found: list[Array] = []
    try:
        if header["call"] == "send":
            host.send(arrays[0], window=header["window"])
        elif header["call"] == "answer":
            found = [host.answer()]
        else:
            host.flush()
    except StreamFault as error:
        child.send({"kind": "fault", "text": str(error)})
    else:
        child.send({"kind": "done"}, found)


def _death(plan: Plan, stage: str, how: str, *, limited: bool, wall_s: float) -> bytes:
    """The answer for a plan whose child has died, under a limit or not."""
    if limited and plan.memory_bytes is not None:
        outcome = Outcome.OUT_OF_MEMORY
        text = (
            f"its process {how} under a limit of {plan.memory_bytes / 1e6:,.1f} MB above the idle trainer (device "
            f"{plan.device}, round {plan.version}, stage {stage})"
        )
    else:
        outcome, text, stage = Outcome.LOST, f"its process {how} in stage {stage}", "run"
    answer = Answer(
        outcome=outcome,
        stage=stage,
        error=text,
        measured=Measured(wall_s=wall_s),
        enforced=True if limited else None,
    )
    return msgspec.msgpack.encode(answer)
