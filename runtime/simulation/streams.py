"""Streams between devices and partition hosts, in simulated time: device, links and hosts overlap as the window lets them.

    device    forward 0 | forward 1 | ...           one operation after another, in one order
    uplink        packet 0 | packet 1 | ...         in order; each joins it one latency after it was sent
    host              batch 0 | batch 1 | ...       first come, first served, of all its devices; ties by plan
    downlink                answer 0 | ...          as the uplink; where nothing is answered, one latency

With answers (gradients) a device runs forward until ``window`` packets are out, and then for each answer that comes backward
once and forward once. Without, it runs forward, sends as soon as fewer than ``window`` packets are out that the host has not
told it to be done with, and trains its own blocks, if it does; it is done when the host is done with all.

Times of a stream are kept in seconds since it began, and its own operations follow from sums and maxima of these alone. So
what is alone on its links and its host takes, to the last bit, what an estimate says, whenever it begins. Hosts and shared
links are events in the order of time.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...learning.spec import CountOrZero, NonNegative, Positive
from .links import Direction, Link, Links
from .stream_load import Load, Route

_JOIN_UP, _ARRIVE, _HOST_DONE, _JOIN_DOWN, _END = range(5)


@dataclass
class Lane:
    """One direction of a stream: packets go one after another. ``waiting``: (number, when it may join) of those to come."""

    rate: Positive
    links: tuple[Link, ...]
    sizes: Sequence[CountOrZero]
    free_s: float = 0.0
    waiting: deque[tuple[int, float]] = field(default_factory=deque)
    number: int = -1  # of the packet that is next or under way, -1: none
    joined_s: float = 0.0
    under_way: bool = False


@dataclass
class StreamProgress:
    """One stream. Seconds are since it began."""

    plan_id: int
    load: Load
    route: Route
    began_s: float
    up: Lane
    down: Lane
    device_s: float = 0.0  # when the device is free
    host_s: float = 0.0  # when the host was done with the last of its micro-batches
    ran: bool = False  # whether the forward pass of packet ``sent`` is over already
    sent: CountOrZero = 0
    stepped: CountOrZero = 0  # backward passes of answers
    came: CountOrZero = 0  # packets at the host
    done: CountOrZero = 0  # micro-batches that the host is done with
    back: list[float] = field(default_factory=list)  # when the answer to a packet, or word of it, is there
    over: bool = False


@dataclass
class HostQueue:
    """One host: the plan whose micro-batch it computes, and those that wait, as (plan, number, when it came)."""

    busy: int | None = None
    queue: deque[tuple[int, int, float]] = field(default_factory=deque)


class Streams:
    """All streams under way. Their packets share ``up`` and ``down`` with whatever else is there, under their plan's number."""

    # By a checkpoint.
    SAVED: ClassVar = {"_streams": dict[int, StreamProgress], "_hosts": dict[int, HostQueue], "_next": CountOrZero,
                       "_events": list[tuple[NonNegative, int, int, Literal[0, 1, 2, 3, 4], int, NonNegative]]}  # fmt: skip
    NOT_SAVED = ("_links",)

    def __init__(self, *, up: Links, down: Links) -> None:
        """None yet. Whoever owns the links says when a packet ``landed``."""
        self._links = {"up": up, "down": down}
        self._streams: dict[int, StreamProgress] = {}
        self._hosts: defaultdict[int, HostQueue] = defaultdict(HostQueue)
        # (second, plan, number of the event, what, micro-batch, the same second since the stream began)
        self._events: list[tuple[float, int, int, int, int, float]] = []
        self._next = 0  # number of the next event

    def begin(self, plan_id: int, load: Load, route: Route, *, now_s: float) -> None:
        """The device has all that it needs."""
        up = Lane(route.up_rate, route.up_links, load.up)
        down = Lane(route.down_rate, route.down_links, load.down)
        stream = StreamProgress(plan_id, load, route, now_s, up, down)
        self._streams[plan_id] = stream
        self._run(stream)

    def first(self) -> tuple[float, int] | None:
        """When and for which plan the next event is; transfers on shared links are not among them."""
        return self._events[0][:2] if self._events else None

    def change(self) -> float | None:
        """The next event: the seconds of its stream, if that is over now."""
        time_s, plan_id, _, kind, number, at_s = heapq.heappop(self._events)
        stream = self._streams[plan_id]
        if kind == _ARRIVE:
            self._arrive(stream, number, at_s)
        elif kind == _HOST_DONE:
            self._host_done(stream, number, at_s, time_s)
        elif kind == _END:
            del self._streams[plan_id]
            return at_s
        else:
            name: Direction = "up" if kind == _JOIN_UP else "down"
            lane = stream.up if kind == _JOIN_UP else stream.down
            lane.under_way, lane.joined_s = True, at_s
            self._links[name].begin(
                plan_id, num_bytes=lane.sizes[number], cap=lane.rate, links=lane.links, now_s=time_s
            )
        return None

    def landed(self, plan_id: int, direction: Direction, *, now_s: float) -> None:
        """The packet of a stream that is under way on shared links is there."""
        stream = self._streams[plan_id]
        lane = stream.up if direction == "up" else stream.down
        number, lane.under_way, lane.number = lane.number, False, -1
        lane.free_s = lane.joined_s + self._links[direction].end(plan_id, now_s=now_s)
        if lane.waiting:
            self._join(stream, lane)
        self._through(stream, lane, number)

    def cancel(self, plan_id: int, *, now_s: float) -> tuple[int, int]:
        """Forget a stream: it frees its links and its host. Packets that the host had got, and those it was done with."""
        stream = self._streams.pop(plan_id)
        self._events = [event for event in self._events if event[1] != plan_id]
        heapq.heapify(self._events)
        for name, lane in (("up", stream.up), ("down", stream.down)):
            if lane.under_way:
                self._links[name].end(plan_id, now_s=now_s)
        host = self._hosts[stream.route.host]
        host.queue = deque(entry for entry in host.queue if entry[0] != plan_id)
        if host.busy == plan_id:
            host.busy = None
            self._serve(host, now_s)
        return stream.came, stream.done

    def _run(self, stream: StreamProgress) -> None:
        """Have the device do all that it can do by what is known now."""
        if stream.over:
            return
        if stream.load.answers:
            self._run_both_ways(stream)
            ended, at_s = stream.stepped == len(stream.load.up), stream.device_s
        else:
            self._run_forward(stream)
            ended = len(stream.back) == len(stream.load.up)
            at_s = max(stream.device_s, stream.back[-1]) if stream.back else stream.device_s
        if ended:
            stream.over = True
            self._event(stream, _END, 0, at_s)

    def _run_both_ways(self, stream: StreamProgress) -> None:
        """Forward while the window lets it, else backward when an answer is there."""
        load = stream.load
        while True:
            if stream.sent < len(load.up) and stream.sent - stream.stepped < load.window:
                stream.device_s += load.forward_s[stream.sent]
                self._send(stream, stream.up, stream.sent, stream.device_s)
                stream.sent += 1
            elif stream.stepped < len(stream.back):
                stream.device_s = max(stream.device_s, stream.back[stream.stepped]) + load.rest_s[stream.stepped]
                stream.stepped += 1
            else:
                return

    def _run_forward(self, stream: StreamProgress) -> None:
        """Forward; send when the window lets it; its own training."""
        load = stream.load
        while stream.sent < len(load.up):
            if not stream.ran:
                stream.device_s += load.forward_s[stream.sent]
                stream.ran = True
            freed_by = stream.sent - load.window
            if freed_by >= len(stream.back):
                return
            if freed_by >= 0:
                stream.device_s = max(stream.device_s, stream.back[freed_by])
            self._send(stream, stream.up, stream.sent, stream.device_s)
            stream.device_s += load.rest_s[stream.sent]
            stream.sent, stream.ran = stream.sent + 1, False

    def _send(self, stream: StreamProgress, lane: Lane, number: int, at_s: float) -> None:
        """A packet sets out. On a link of its own it is known at once when it will be there."""
        joins_s = at_s + stream.route.latency_s
        if lane.links:
            lane.waiting.append((number, joins_s))
            if lane.number < 0:
                self._join(stream, lane)
        else:
            lane.free_s = max(joins_s, lane.free_s) + lane.sizes[number] / lane.rate
            self._through(stream, lane, number)

    def _join(self, stream: StreamProgress, lane: Lane) -> None:
        """The next packet joins its shared links as soon as it can."""
        lane.number, joins_s = lane.waiting.popleft()
        kind = _JOIN_UP if lane is stream.up else _JOIN_DOWN
        self._event(stream, kind, lane.number, max(joins_s, lane.free_s))

    def _through(self, stream: StreamProgress, lane: Lane, number: int) -> None:
        """A packet is there when its lane is free again, which may be a time to come."""
        if lane is stream.up:
            self._event(stream, _ARRIVE, number, lane.free_s)
        else:
            stream.back.append(lane.free_s)
            self._run(stream)

    def _arrive(self, stream: StreamProgress, number: int, at_s: float) -> None:
        """A packet is at its host."""
        stream.came += 1
        host = self._hosts[stream.route.host]
        if host.busy is None:
            self._compute(host, stream, number, max(at_s, stream.host_s))
        else:
            host.queue.append((stream.plan_id, number, at_s))

    def _compute(self, host: HostQueue, stream: StreamProgress, number: int, at_s: float) -> None:
        """The host begins with a micro-batch."""
        host.busy = stream.plan_id
        self._event(stream, _HOST_DONE, number, at_s + stream.load.host_s[number])

    def _host_done(self, stream: StreamProgress, number: int, at_s: float, now_s: float) -> None:
        """The host is done with a micro-batch, and answers."""
        stream.host_s = at_s
        stream.done += 1
        host = self._hosts[stream.route.host]
        host.busy = None
        self._serve(host, now_s, last=stream)
        if stream.load.answers:
            self._send(stream, stream.down, number, at_s)
        else:
            stream.back.append(at_s + stream.route.latency_s)
            self._run(stream)

    def _serve(self, host: HostQueue, now_s: float, *, last: StreamProgress | None = None) -> None:
        """The host takes what has waited longest. ``last``: whose micro-batch it did before."""
        if host.queue:
            plan_id, number, came_s = host.queue.popleft()
            stream = self._streams[plan_id]
            free_s = stream.host_s if stream is last else now_s - stream.began_s
            self._compute(host, stream, number, max(came_s, free_s))

    def _event(self, stream: StreamProgress, kind: int, number: int, at_s: float) -> None:
        heapq.heappush(self._events, (stream.began_s + at_s, stream.plan_id, self._next, kind, number, at_s))
        self._next += 1
