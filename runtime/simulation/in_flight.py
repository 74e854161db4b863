"""Plans in flight under the virtual clock: the stages of each, what is charged for them, and the transfers of their packets.

A packet joins its shared links, if it crosses any, one latency after it was sent.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...actors.pool import Finished, StreamBytes
from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...learning.spec import CountOrZero
from ...policies.estimate import NO_STREAM, Estimate, StreamCharge, charge, compute_s, transfer_s
from ...policies.plan import Plan
from ...policies.report import Outcome, Report
from .disruptions import Disruption
from .network_links import SERVER_LINK, Direction, LinkId, NetworkLinks, capacities, crossed_links
from .stream_load import Load, Work


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """The end of a plan: when, its result, and what the clock charged for it.

    ``lost_up_bytes``: bytes of a lost plan's update that had been transferred. ``down_bytes``: bytes of its packets down that
    had been transferred (None: all).
    """

    time_s: float
    finished: Finished
    virtual: Estimate
    lost_up_bytes: int = 0
    down_bytes: int | None = None


@dataclass
class InFlightPlan:
    """One plan in flight. ``profile``: its device's at present. Bytes and FLOPs are those that are charged."""

    plan: Plan
    profile: DeviceProfile
    disruption: Disruption
    down_bytes: CountOrZero
    flops: CountOrZero
    peak_memory_bytes: CountOrZero
    work: Work | None = None
    # In order: "down", then "compute", or "stream" for a split plan, then "up"; "gone" once it is lost.
    stage: Literal["down", "compute", "stream", "up", "gone"] = "down"
    began_s: float = 0.0  # the stage
    sharing: Literal["", "latency", "active"] = ""  # of its packet on shared links
    num_bytes: CountOrZero = 0
    transfer_s: float = 0.0
    down_s: float = 0.0
    up_s: float = 0.0
    load: Load | None = None
    crossing: StreamCharge = NO_STREAM
    finished: Finished | None = None
    lost_up_bytes: CountOrZero = 0

    @property
    def reported_stage(self) -> str:
        """The stage by its name in reports."""
        return "train" if self.stage == "compute" else self.stage

    def abort(self, received: int, processed: int, *, now_s: float, planned: bool) -> StreamBytes:
        """Abort the current stage, and charge only what was completed. Returns the packets that had crossed the cut.

        ``received``: bytes of the packet that were transferred, or packets of the stream at the host. ``processed``:
        micro-batches that the host had processed. ``planned``: the stage had reached the end that its disruption sets.
        """
        seconds = max(0.0, now_s - self.began_s)  # a busy server has not begun to send
        if self.stage == "stream":
            return self._abort_stream(received, processed, seconds)
        received = self.num_bytes if planned else received
        if self.stage == "down":
            self.down_bytes, self.down_s, self.flops = received, seconds, 0
        elif self.stage == "up":
            self.lost_up_bytes, self.up_s = received, seconds
        elif not planned:
            self.flops = min(self.flops, int(seconds * self.profile.flop_per_s))
        return self.finished.stream if self.finished is not None else StreamBytes()

    def _abort_stream(self, received: int, processed: int, seconds: float) -> StreamBytes:
        assert self.load is not None
        assert self.work is not None
        load, work = self.load, self.work
        samples = work.samples
        computed = work.forward_flops * sum(samples[:received])
        computed += (work.flops - work.forward_flops) * sum(samples[:processed])
        self.flops = min(computed, int(seconds * self.profile.flop_per_s))
        carried = StreamBytes(tuple(load.up[:received]), tuple(load.down[:processed]))
        self.crossing = StreamCharge(
            up_bytes=sum(carried.up),
            down_bytes=sum(carried.down),
            host_flops=work.host_flops * sum(samples[:processed]),
            seconds=max(0.0, seconds - compute_s(self.flops, flop_per_s=self.profile.flop_per_s)),
        )
        return carried

    def lose(self, *, stage: str, error: str, stream: StreamBytes) -> None:
        """Mark the plan as lost."""
        report = Report(plan=self.plan, outcome=Outcome.LOST, stage=stage, error=error)
        self.stage = "gone"
        self.finished = Finished(plan=self.plan, report=report, update=None, state=None, control_bytes=0, stream=stream)

    def arrival(self, *, time_s: float) -> Arrival:
        """The record of a plan that has ended."""
        assert self.finished is not None
        update = self.finished.update
        virtual = charge(
            self.profile,
            down_bytes=self.down_bytes,
            flops=self.flops,
            up_bytes=self.lost_up_bytes if update is None else update.nbytes,
            peak_memory_bytes=self.peak_memory_bytes,
            down_s=self.down_s,
            up_s=self.up_s,
            crossing=self.crossing,
        )
        return Arrival(
            time_s=time_s,
            finished=self.finished,
            virtual=virtual,
            lost_up_bytes=self.lost_up_bytes,
            down_bytes=self.down_bytes,
        )


class Transfers:
    """Packets between server and devices. ``down`` and ``up`` hold those on shared links, besides the packets of streams."""

    SAVED: ClassVar = {"down": NetworkLinks, "up": NetworkLinks}  # in a checkpoint
    NOT_SAVED = ("_fleet",)

    def __init__(self, fleet: Fleet) -> None:
        """No packets."""
        self.down = NetworkLinks(capacities(fleet, "down"))
        self.up = NetworkLinks(capacities(fleet, "up"))
        self._fleet = fleet

    def send(self, entry: InFlightPlan, stage: Direction, num_bytes: int, *, now_s: float) -> float:
        """Send a packet; returns the second at which it joins its shared links, or, without any, arrives."""
        entry.stage, entry.num_bytes, entry.began_s = stage, num_bytes, now_s
        rate, shared = self._path(entry)
        latency_s = entry.profile.latency_s
        if shared:
            entry.sharing = "latency"
            return now_s + latency_s
        entry.transfer_s = transfer_s(num_bytes, bytes_per_s=rate, latency_s=latency_s)
        return now_s + entry.transfer_s

    def join(self, entry: InFlightPlan, *, now_s: float) -> None:
        """A packet joins its shared links."""
        entry.sharing = "active"
        rate, shared = self._path(entry)
        self._links(entry).begin(entry.plan.id, num_bytes=entry.num_bytes, cap=rate, links=shared, now_s=now_s)

    def landed(self, entry: InFlightPlan, *, now_s: float) -> float:
        """A packet has arrived; returns the seconds that it took."""
        if entry.sharing == "active":
            shared_s = self._links(entry).end(entry.plan.id, now_s=now_s)
            entry.transfer_s = entry.profile.latency_s + shared_s
            entry.sharing = ""
        return entry.transfer_s

    def cancel(self, entry: InFlightPlan, *, now_s: float) -> int:
        """Cancel a packet's transfer, and free its links; returns the bytes that were transferred."""
        if entry.sharing == "latency":
            return 0
        if entry.sharing == "active":
            links, key = self._links(entry), entry.plan.id
            transferred = links.transferred_bytes(key, now_s=now_s)
            links.end(key, now_s=now_s)
            return transferred
        rate, _ = self._path(entry)
        seconds = now_s - entry.began_s - entry.profile.latency_s
        return min(entry.num_bytes, max(0, int(seconds * rate)))

    def _links(self, entry: InFlightPlan) -> NetworkLinks:
        return self.down if entry.stage == "down" else self.up

    def _path(self, entry: InFlightPlan) -> tuple[float, tuple[LinkId, ...]]:
        """The rate of the device's own link, and the shared links that its packet crosses."""
        direction: Direction = "down" if entry.stage == "down" else "up"
        rate: float = getattr(entry.profile, f"{direction}_bytes_per_s")
        return rate, crossed_links(self._fleet, entry.profile, direction, to=SERVER_LINK)
