"""One plan's way through the virtual clock: its stages, what is charged for them, and how it ends."""

from dataclasses import dataclass
from typing import Literal

from ...actors.pool import Finished, StreamBytes
from ...clusters.profile import DeviceProfile
from ...learning.spec import CountOrZero
from ...policies.estimate import NO_STREAM, Estimate, StreamCharge, charge, compute_s
from ...policies.plan import Plan
from ...policies.report import Outcome, Report
from .disruptions import Disruption
from .stream_load import Load, Work


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A plan's end: when, what came back, and what the clock charged for it.

    ``lost_up_bytes``: of a plan that is lost, what of its update had travelled. ``down_bytes``: of its packets down, what had
    travelled (None: all).
    """

    time_s: float
    finished: Finished
    virtual: Estimate
    lost_up_bytes: int = 0
    down_bytes: int | None = None


@dataclass
class InFlightPlan:
    """One plan in flight. ``profile``: its device as it is this time. The bytes and FLOPs are those that are charged."""

    plan: Plan
    profile: DeviceProfile
    fate: Disruption
    down_bytes: CountOrZero
    flops: CountOrZero
    peak_memory_bytes: CountOrZero
    work: Work | None = None
    # First "down", then "compute", or "stream" of a split plan, then "up"; "gone" once it is lost.
    stage: Literal["down", "compute", "stream", "up", "gone"] = "down"
    began_s: float = 0.0  # the stage
    sharing: Literal["", "latency", "under way"] = ""  # on a shared link
    num_bytes: CountOrZero = 0
    transfer_s: float = 0.0
    down_s: float = 0.0
    up_s: float = 0.0
    load: Load | None = None
    crossing: StreamCharge = NO_STREAM
    finished: Finished | None = None
    lost_up_bytes: CountOrZero = 0

    @property
    def told_stage(self) -> str:
        """The stage as reports name it."""
        return "train" if self.stage == "compute" else self.stage

    def broken_off(self, came: int, done: int, *, now_s: float, by_fate: bool) -> StreamBytes:
        """Its stage breaks off: charge what ``came`` by now, in bytes or packets, of which the host has ``done`` so many.

        ``by_fate``: the stage was as long as it was to be. What had crossed the cut is given back.
        """
        seconds = now_s - self.began_s
        if self.stage == "stream":
            return self._streamed(came, done, seconds)
        came = self.num_bytes if by_fate else came
        if self.stage == "down":
            self.down_bytes, self.down_s, self.flops = came, seconds, 0
        elif self.stage == "up":
            self.lost_up_bytes, self.up_s = came, seconds
        elif not by_fate:
            self.flops = min(self.flops, int(seconds * self.profile.flop_per_s))
        return self.finished.stream if self.finished is not None else StreamBytes()

    def _streamed(self, came: int, done: int, seconds: float) -> StreamBytes:
        assert self.load is not None
        assert self.work is not None
        load, work = self.load, self.work
        samples = work.samples
        computed = work.forward_flops * sum(samples[:came]) + (work.flops - work.forward_flops) * sum(samples[:done])
        self.flops = min(computed, int(seconds * self.profile.flop_per_s))
        carried = StreamBytes(tuple(load.up[:came]), tuple(load.down[:done]))
        self.crossing = StreamCharge(
            up_bytes=sum(carried.up),
            down_bytes=sum(carried.down),
            host_flops=work.host_flops * sum(samples[:done]),
            seconds=max(0.0, seconds - compute_s(self.flops, flop_per_s=self.profile.flop_per_s)),
        )
        return carried

    def lose(self, *, stage: str, error: str, stream: StreamBytes) -> None:
        """Its end is that it is lost."""
        report = Report(plan=self.plan, outcome=Outcome.LOST, stage=stage, error=error)
        self.stage = "gone"
        self.finished = Finished(plan=self.plan, report=report, update=None, state=None, control_bytes=0, stream=stream)

    def arrival(self, *, time_s: float) -> Arrival:
        """The record of it, once it is over."""
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
