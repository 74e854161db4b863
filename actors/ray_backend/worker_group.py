"""The workers of the pool on Ray: one in each bundle for the simulated devices, and one on the node of each real device.

Workers of bundles are replaced when they die, and the run ends if a group of devices that is needed has no worker and none is
starting. The worker of a real device exists while its node does; without it the device is unreachable, and the run goes on.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from ...clusters.ray_backend.checks import versions_here
from ...clusters.ray_backend.real_devices import RealDevice
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ..pool import WorkerFailure
from .actor_group import ActorGroup, GroupMember
from .actor_placement import ActorPlacement
from .device_registry import DeviceRegistry
from .failures import ACTOR_DIED, earliest
from .hang_detector import HangDetector
from .host_actor import HostSlot
from .worker_actor import WorkerActor, start_worker

_PLANS_PER_WORKER = 2  # one runs, one waits, so that the worker is not idle between two


@dataclass(frozen=True)
class Assignment:
    """A plan that was sent to a worker: the references of report, update and state, and its slot if it is split."""

    plan: Plan
    references: list[Any]
    slot: HostSlot | None


@dataclass(eq=False)
class Worker(GroupMember):
    """A worker that is ready, and the plans sent to it by id, in order: the first one runs, the others wait."""

    handle: WorkerActor
    assigned: dict[int, Assignment] = field(default_factory=dict)

    @property
    def slot(self) -> HostSlot | None:
        """The slot of the plan that runs, if it is split."""
        return next(iter(self.assigned.values())).slot if self.assigned else None


def least_loaded(workers: Iterable[Worker], group: str) -> Worker | None:
    """The worker of a group that is sent the next plan; None if all have as many as they take."""
    candidates = [worker for worker in workers if worker.placement.group == group]
    free = [worker for worker in candidates if len(worker.assigned) < _PLANS_PER_WORKER]
    return min(free, key=lambda worker: len(worker.assigned), default=None)


class WorkerGroup:
    """The workers that are ready and starting, the plans sent to them, and which of them hang."""

    def __init__(
        self,
        settings: WorkloadSettings,
        placements: Sequence[ActorPlacement],
        devices: DeviceRegistry,
        *,
        min_devices: int = 0,
        placement_timeout_s: float,
        stuck_after_s: float | None = None,
        enforce: bool = False,
        report: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start a worker in each of ``placements``, and for each real device that has joined.

        ``min_devices``: real devices without which the run does not begin. ``stuck_after_s``: real seconds that a worker may
        take over one plan (None: any). ``enforce``: memory budgets. ``report``: receives sentences for the operator.
        """
        versions = versions_here()

        def start(placement: ActorPlacement) -> tuple[Any, Any]:
            site = devices.sites[placement.device.number] if placement.device is not None else None
            worker = start_worker(settings, placement, site, enforce=enforce)
            return worker, worker.warm_up.remote(versions, placement.device is None)

        self._group = ActorGroup(start, Worker, placement_timeout_s=placement_timeout_s, report=report)
        self._devices, self._min_devices, self._report = devices, min_devices, report
        self._hangs = HangDetector[Worker](stuck_after_s, now=now)
        self._last_failure = ""
        # What a worker imports takes seconds of a core. The server needs one too, and the first worker can train early.
        cores = int(ray.cluster_resources().get("CPU", 1))
        self._group.start_staggered(placements, at_once=max(1, cores - 1))
        self.update_devices()
        self._reported_missing = set(devices.numbers) - devices.sites.keys()  # by the driver

    @property
    def ready(self) -> list[Worker]:
        """The workers that are ready."""
        return list(self._group.ready.values())

    @property
    def references(self) -> list[Any]:
        """References of the workers that are starting, to wait for; ``arrived`` takes each."""
        return self._group.references

    @property
    def size(self) -> int:
        """Workers that are ready, starting or queued."""
        return len(self._group.ready) + len(self._group.pending)

    @property
    def unreachable(self) -> frozenset[int]:
        """Real devices without a worker that is ready."""
        devices = (placement.device for placement in self._group.ready)
        return self._devices.numbers - {device.number for device in devices if device is not None}

    def assignments(self) -> dict[Any, tuple[Worker, int]]:
        """Worker and plan by the reference that is ready when the plan has ended."""
        return {
            assignment.references[0]: (worker, plan_id)
            for worker in self._group.ready.values()
            for plan_id, assignment in worker.assigned.items()
        }

    def check(self, *needed: str) -> None:
        """Raise ``WorkerFailure`` if a needed group of devices has no worker and none is starting, or if no device is left."""
        groups = {placement.group for placement in [*self._group.ready, *self._group.pending]}
        if not groups and (why := self._devices.no_device_reset()):
            raise WorkerFailure(f"no device is left: {why}")
        for group in set(needed) - groups - self._devices.groups:
            reason = f": {self._last_failure}" if self._last_failure else ""
            raise WorkerFailure(f"no worker is left for {group or 'the simulated devices'}{reason}")

    def wait_until_ready(self) -> None:
        """Wait for the first worker of the simulated devices, and for those of all real devices that have joined.

        Raises ``ValueError`` for what a worker cannot load, ``WorkerFailure`` if one cannot be started or real devices are
        missing.
        """
        try:
            while self._must_wait():
                for reference in ray.wait(self.references, num_returns=1, timeout=self._group.left_s())[0]:
                    self._group.arrived(reference)
                self._group.check_late()
                self._handle_failures(starting=True)
            joined = len(self._devices.numbers - self.unreachable)
            if joined < self._min_devices:
                raise WorkerFailure(
                    f"{joined} real devices are there, and {self._min_devices} are needed; {self._devices.absences()}"
                )
        except BaseException:
            self.close()
            raise

    def arrived(self, reference: Any) -> None:
        """A worker has ended its start, well or not."""
        worker = self._group.arrived(reference)
        device = worker.placement.device if worker is not None else None
        if device is not None and device.number in self._reported_missing:
            self._reported_missing.remove(device.number)
            self._report(f"{device.name} has joined ({self._devices.sites[device.number].description})")
        self._handle_failures()

    def left_s(self, *, ignoring: Collection[Worker] = ()) -> float | None:
        """Seconds until ``check_late``, ``update_devices`` or ``hung`` has something to do; None if nothing is expected."""
        return earliest(self._group.left_s(), self._devices.left_s(), self._hangs.left_s(ignoring=ignoring))

    def check_late(self) -> None:
        """Give up workers that should have been placed, or ready, by now."""
        self._group.check_late()
        self._handle_failures()

    def update_devices(self) -> list[tuple[Worker, str]]:
        """Start workers on the nodes of real devices that have joined.

        The workers whose nodes are gone, each with the reason: the caller ends them by ``replace``.
        """
        joined, gone = self._devices.poll()
        for placement in joined:
            self._group.start(placement)
        lost = []
        for placement, reason in gone:
            if placement in self._group.ready:
                lost.append((self._group.ready[placement], reason))
            elif placement.device is not None:  # its worker was still starting
                self._group.discard(placement)
                self._lose_device(placement.device, reason)
        return lost

    def assign(self, worker: Worker, assignment: Assignment) -> None:
        """A plan was sent to a worker."""
        if not worker.assigned:
            self._hangs.restart(worker)
        worker.assigned[assignment.plan.id] = assignment

    def release(self, worker: Worker, plan_id: int) -> Assignment:
        """A plan has ended at a worker, which goes on with the next one."""
        assignment = worker.assigned.pop(plan_id)
        if worker.assigned:
            self._hangs.restart(worker)
        else:
            self._hangs.stop(worker)
        return assignment

    def hung(self, *, ignoring: Collection[Worker] = ()) -> list[tuple[Worker, str]]:
        """The workers that are at one plan for too long, each with a sentence. ``ignoring``: those that wait for a host."""
        reason = f"stuck: it ran one plan for more than {self._hangs.limit_s:g} s" if self._hangs.limit_s else ""
        return [(worker, reason) for worker in self._hangs.hung(ignoring=ignoring)]

    def restart_stopwatches(self) -> None:
        """A partition host has hung: workers that run a split plan may have waited for it, and have their full time again."""
        for worker in self._group.ready.values():
            if worker.slot is not None:
                self._hangs.restart(worker)

    def on_node(self, node: str) -> list[Worker]:
        """The workers on a node."""
        return self._group.on_node(node)

    def replace(self, worker: Worker, reason: str, *, node_is_gone: bool = False) -> None:
        """A worker has died, or is to be ended: start another one. That of a real device is lost with its node.

        On its node a new worker of a real device holds nothing. A plan that is sent again to it may build on what was held; it
        fails then, and the next one is sent a dense model.
        """
        self._hangs.stop(worker)
        device = worker.placement.device
        if node_is_gone and device is not None:
            self._group.discard(worker.placement)
            self._lose_device(device, reason)
            return
        if device is not None:
            self._devices.restarted(device)
        self._group.replace(worker, reason)

    def close(self) -> None:
        """End all workers."""
        self._group.close()

    def _must_wait(self) -> bool:
        """Whether the run cannot begin yet: the first worker of the simulated devices, or that of a real one, is starting."""
        has_shared = any(placement.device is None for placement in self._group.ready)
        needed = [placement for placement in self._group.pending if placement.device is not None or not has_shared]
        return any(self._group.is_loading(placement) for placement in needed)

    def _handle_failures(self, *, starting: bool = False) -> None:
        """Report the workers that were given up, and lose their real devices.

        ``starting``: the run has not begun, and a failure ends it, unless a real device has gone away meanwhile.
        """
        for failure in self._group.take_failed():
            device = failure.placement.device
            if starting and (device is None or not isinstance(failure.cause, ACTOR_DIED)):
                raise failure.error() from None
            if device is not None:
                self._lose_device(device, f"its worker {failure.predicate}")
            else:
                self._last_failure = str(failure)
                self._report(f"{failure}; {len(self._group.ready)} workers are left")

    def _lose_device(self, device: RealDevice, reason: str) -> None:
        """A real device is not reachable any more."""
        self._devices.remove(device, reason)
        self._reported_missing.add(device.number)
        self._report(f"{device.name} cannot be reached: {reason}")
