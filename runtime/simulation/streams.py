"""Streams between devices and partition hosts in simulated time: device, links and hosts overlap as the window allows.

    device    forward 0 | forward 1 | ...           one operation at a time, in a fixed order
    uplink        packet 0 | packet 1 | ...         in order; each joins it one latency after it was sent
    host              batch 0 | batch 1 | ...       first come, first served, over all its devices; ties by plan
    downlink                answer 0 | ...          as the uplink; without answers, one latency

With answers (gradients) a device runs forward until ``window`` packets are outstanding, then, for each answer that arrives,
backward once and forward once. Without answers it runs forward, sends once fewer than ``window`` packets are outstanding that
the host has not acknowledged as processed, and trains its own blocks if the plan says so; it ends when the host has processed
all of them.

Times of a stream are kept in seconds since it began, and its own operations follow from sums and maxima of these alone. A
stream that is alone on its links and its host therefore takes exactly the seconds of its estimate, to the last bit, whenever
it begins. Hosts and shared links are simulated as events in the order of time.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...learning.spec import CountOrZero, NonNegative, Positive
from .network_links import Direction, LinkId, NetworkLinks
from .stream_load import Load, StreamPath

_JOIN_UP, _ARRIVE, _HOST_DONE, _JOIN_DOWN, _END = range(5)


@dataclass
class PacketQueue:
    """One direction of a stream: packets are sent one after another. ``waiting``: (number, when it may join its links)."""

    rate: Positive
    links: tuple[LinkId, ...]
    sizes: Sequence[CountOrZero]
    free_s: float = 0.0
    waiting: deque[tuple[int, float]] = field(default_factory=deque)
    number: int = -1  # of the packet that is next or being transferred on shared links; -1: none
    joined_s: float = 0.0
    active: bool = False  # whether packet ``number`` is being transferred


@dataclass
class StreamProgress:
    """The state of one stream. Seconds are since it began."""

    plan_id: int
    load: Load
    route: StreamPath
    began_s: float
    up: PacketQueue
    down: PacketQueue
    device_s: float = 0.0  # when the device is free
    host_s: float = 0.0  # when the host had processed this stream's newest micro-batch
    forwarded: bool = False  # whether the forward pass of packet ``sent`` is done already
    sent: CountOrZero = 0
    stepped: CountOrZero = 0  # answers whose backward passes are done
    received: CountOrZero = 0  # packets at the host
    processed: CountOrZero = 0  # micro-batches that the host has processed
    answered_s: list[float] = field(default_factory=list)  # when the device has each answer or acknowledgement
    ended: bool = False


@dataclass
class HostQueue:
    """One host: the plan whose micro-batch it processes, and the waiting ones as (plan, number, when it arrived)."""

    busy: int | None = None
    queue: deque[tuple[int, int, float]] = field(default_factory=deque)


class Streams:
    """All active streams. Their packets share ``up`` and ``down`` with other transfers; the key is the plan's id."""

    # In a checkpoint.
    SAVED: ClassVar = {"_streams": dict[int, StreamProgress], "_hosts": dict[int, HostQueue], "_next": CountOrZero,
                       "_events": list[tuple[NonNegative, int, int, Literal[0, 1, 2, 3, 4], int, NonNegative]]}  # fmt: skip
    NOT_SAVED = ("_links",)

    def __init__(self, *, up: NetworkLinks, down: NetworkLinks) -> None:
        """No streams. The owner of the links calls ``landed`` when a packet's transfer ends."""
        self._links = {"up": up, "down": down}
        self._streams: dict[int, StreamProgress] = {}
        self._hosts: defaultdict[int, HostQueue] = defaultdict(HostQueue)
        # (second, plan, number of the event, type, micro-batch, the same second since the stream began)
        self._events: list[tuple[float, int, int, int, int, float]] = []
        self._next = 0  # number of the next event

    def begin(self, plan_id: int, load: Load, route: StreamPath, *, now_s: float) -> None:
        """Start a plan's stream, whose device has its packets."""
        up = PacketQueue(route.up_rate, route.up_links, load.up)
        down = PacketQueue(route.down_rate, route.down_links, load.down)
        stream = StreamProgress(plan_id, load, route, now_s, up, down)
        self._streams[plan_id] = stream
        self._run(stream)

    def first(self) -> tuple[float, int] | None:
        """Time and plan of the next event; ends of transfers on shared links are not among them."""
        return self._events[0][:2] if self._events else None

    def change(self) -> float | None:
        """Process the next event. Returns the stream's seconds if it has ended, else None."""
        time_s, plan_id, _, event, number, at_s = heapq.heappop(self._events)
        stream = self._streams[plan_id]
        if event == _ARRIVE:
            self._arrive(stream, number, at_s)
        elif event == _HOST_DONE:
            self._host_done(stream, number, at_s, time_s)
        elif event == _END:
            del self._streams[plan_id]
            return at_s
        else:
            direction: Direction = "up" if event == _JOIN_UP else "down"
            packets = stream.up if event == _JOIN_UP else stream.down
            packets.active, packets.joined_s = True, at_s
            self._links[direction].begin(
                plan_id, num_bytes=packets.sizes[number], cap=packets.rate, links=packets.links, now_s=time_s
            )
        return None

    def landed(self, plan_id: int, direction: Direction, *, now_s: float) -> None:
        """A stream's packet has crossed its shared links."""
        stream = self._streams[plan_id]
        packets = stream.up if direction == "up" else stream.down
        number, packets.active, packets.number = packets.number, False, -1
        packets.free_s = packets.joined_s + self._links[direction].end(plan_id, now_s=now_s)
        if packets.waiting:
            self._join(stream, packets)
        self._delivered(stream, packets, number)

    def cancel(self, plan_id: int, *, now_s: float) -> tuple[int, int]:
        """Remove a stream, and free its links and its host. Returns packets received and micro-batches processed there."""
        stream = self._streams.pop(plan_id)
        self._events = [event for event in self._events if event[1] != plan_id]
        heapq.heapify(self._events)
        for direction, packets in (("up", stream.up), ("down", stream.down)):
            if packets.active:
                self._links[direction].end(plan_id, now_s=now_s)
        host = self._hosts[stream.route.host]
        host.queue = deque(entry for entry in host.queue if entry[0] != plan_id)
        if host.busy == plan_id:
            host.busy = None
            self._serve(host, now_s)
        return stream.received, stream.processed

    def _run(self, stream: StreamProgress) -> None:
        """Advance the device through all operations whose inputs are known."""
        if stream.ended:
            return
        if stream.load.answers:
            self._run_with_answers(stream)
            ended, at_s = stream.stepped == len(stream.load.up), stream.device_s
        else:
            self._run_forward(stream)
            ended = len(stream.answered_s) == len(stream.load.up)
            at_s = max(stream.device_s, stream.answered_s[-1]) if stream.answered_s else stream.device_s
        if ended:
            stream.ended = True
            self._event(stream, _END, 0, at_s)

    def _run_with_answers(self, stream: StreamProgress) -> None:
        """Run forward while the window allows it, else backward for an answer that is known."""
        load = stream.load
        while True:
            if stream.sent < len(load.up) and stream.sent - stream.stepped < load.window:
                stream.device_s += load.forward_s[stream.sent]
                self._send(stream, stream.up, stream.sent, stream.device_s)
                stream.sent += 1
            elif stream.stepped < len(stream.answered_s):
                stream.device_s = max(stream.device_s, stream.answered_s[stream.stepped]) + load.rest_s[stream.stepped]
                stream.stepped += 1
            else:
                return

    def _run_forward(self, stream: StreamProgress) -> None:
        """Without answers: run forward, send when the window allows it, then the device's own training."""
        load = stream.load
        while stream.sent < len(load.up):
            if not stream.forwarded:
                stream.device_s += load.forward_s[stream.sent]
                stream.forwarded = True
            freed_by = stream.sent - load.window
            if freed_by >= len(stream.answered_s):
                return
            if freed_by >= 0:
                stream.device_s = max(stream.device_s, stream.answered_s[freed_by])
            self._send(stream, stream.up, stream.sent, stream.device_s)
            stream.device_s += load.rest_s[stream.sent]
            stream.sent, stream.forwarded = stream.sent + 1, False

    def _send(self, stream: StreamProgress, packets: PacketQueue, number: int, at_s: float) -> None:
        """Send a packet. Without shared links the time of its arrival is known at once."""
        joins_s = at_s + stream.route.latency_s
        if packets.links:
            packets.waiting.append((number, joins_s))
            if packets.number < 0:
                self._join(stream, packets)
        else:
            packets.free_s = max(joins_s, packets.free_s) + packets.sizes[number] / packets.rate
            self._delivered(stream, packets, number)

    def _join(self, stream: StreamProgress, packets: PacketQueue) -> None:
        """Schedule when the next packet joins its shared links."""
        packets.number, joins_s = packets.waiting.popleft()
        event = _JOIN_UP if packets is stream.up else _JOIN_DOWN
        self._event(stream, event, packets.number, max(joins_s, packets.free_s))

    def _delivered(self, stream: StreamProgress, packets: PacketQueue, number: int) -> None:
        """A packet's arrival is known: ``packets.free_s``, which may be in the future."""
        if packets is stream.up:
            self._event(stream, _ARRIVE, number, packets.free_s)
        else:
            stream.answered_s.append(packets.free_s)
            self._run(stream)

    def _arrive(self, stream: StreamProgress, number: int, at_s: float) -> None:
        """A packet has arrived at its host."""
        stream.received += 1
        host = self._hosts[stream.route.host]
        if host.busy is None:
            self._process(host, stream, number, max(at_s, stream.host_s))
        else:
            host.queue.append((stream.plan_id, number, at_s))

    def _process(self, host: HostQueue, stream: StreamProgress, number: int, at_s: float) -> None:
        """The host starts a micro-batch."""
        host.busy = stream.plan_id
        self._event(stream, _HOST_DONE, number, at_s + stream.load.host_s[number])

    def _host_done(self, stream: StreamProgress, number: int, at_s: float, now_s: float) -> None:
        """The host has processed a micro-batch, and answers or acknowledges it."""
        stream.host_s = at_s
        stream.processed += 1
        host = self._hosts[stream.route.host]
        host.busy = None
        self._serve(host, now_s, last=stream)
        if stream.load.answers:
            self._send(stream, stream.down, number, at_s)
        else:
            stream.answered_s.append(at_s + stream.route.latency_s)
            self._run(stream)

    def _serve(self, host: HostQueue, now_s: float, *, last: StreamProgress | None = None) -> None:
        """The host takes the micro-batch that has waited longest. ``last``: the stream that it has just served."""
        if host.queue:
            plan_id, number, arrived_s = host.queue.popleft()
            stream = self._streams[plan_id]
            free_s = stream.host_s if stream is last else now_s - stream.began_s
            self._process(host, stream, number, max(arrived_s, free_s))

    def _event(self, stream: StreamProgress, event: int, number: int, at_s: float) -> None:
        heapq.heappush(self._events, (stream.began_s + at_s, stream.plan_id, self._next, event, number, at_s))
        self._next += 1
