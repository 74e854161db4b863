"""What streams to partition hosts cost: the FLOPs of both legs, packet sizes, and the seconds of a stream that is alone.

Packets of codecs whose output depends on the data are estimated at the bytes per sample of the last stream of their kind,
and before the first one at those of random numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec

from ...actors.messages.stream import ActivationStream
from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...comms.codec import ArraySpec, CodecSpec
from ...comms.codecs.make_codec import make_codec
from ...comms.packet import sealed_bytes
from ...learning.parts.part import complement
from ...learning.spec import NonNegative, PartCost, Training
from ...learning.training.split import schedule
from ...learning.workload import Workload
from ...policies.estimate import NO_STREAM, StreamCharge
from ...policies.plan import Plan
from .bounded_cache import BoundedCache
from .links import Links, capacities
from .packet_size_prior import typical_bytes
from .stream_load import Load, Route, Work, charged, route
from .streams import Streams

Row = Callable[..., PartCost]
_MOST_KEPT = 1000  # sequences of micro-batches, and streams: devices that stop early make as many as they like


class StreamCosts:
    """Work and packets of split plans, remembered by what they depend on."""

    SAVED: ClassVar = {"_observed": dict[tuple[Any, ...], tuple[NonNegative, NonNegative]]}  # by a checkpoint
    NOT_SAVED = ("_workload", "_fleet", "_row", "_samples", "_streams", "_alone")

    def __init__(self, workload: Workload, fleet: Fleet, *, row: Row) -> None:
        """``row``: the cost of a part under a training setting, and whether it makes a gradient of what enters it."""
        self._workload, self._fleet, self._row = workload, fleet, row
        self._samples = BoundedCache[tuple[Any, ...], tuple[int, ...]](_MOST_KEPT)
        self._streams: dict[tuple[Any, ...], ActivationStream] = {}
        self._observed: dict[tuple[Any, ...], tuple[float, float]] = {}  # bytes per sample, up and down
        self._alone = BoundedCache[tuple[Any, ...], tuple[Sequence[int], Sequence[int], StreamCharge]](_MOST_KEPT)

    def work(self, plan: Plan, num_samples: int) -> Work | None:
        """What a split plan computes on a device with so many samples; None for a plan that is not split."""
        split, training = plan.split, plan.training
        if split is None:
            return None
        if fault := self._workload.cut_fault:
            raise ValueError(f"split.cut is {split.cut!r}, but the model cannot be cut: {fault}")
        answers = split.method.returns_gradients
        others = complement(self._workload.spec, plan.part, frozen_to=split.depth)
        host = self._row(others, training, entering_gradient=answers)
        replay = split.replays
        device = None if replay else self._row(plan.part, training)
        # Without its head: that runs once the packet is out.
        front = device and self._row(msgspec.structs.replace(plan.part, head="", auxiliaries=()), training)
        return Work(
            samples=self._micro_batches(num_samples, training),
            forward_flops=front.forward_flops if front else 0,
            flops=device.training_flops if device else 0,
            host_flops=host.training_flops,
            window=1 if replay else split.window,
            answers=answers,
            replay=replay,
        )

    def ahead(self, plan: Plan, num_samples: int) -> int:
        """Micro-batches that a device with so many samples has out at once, with all that their gradients will need."""
        if plan.split is None or not plan.split.method.returns_gradients or plan.split.window == 1:
            return 1
        return max(1, min(plan.split.window, len(self._micro_batches(num_samples, plan.training))))

    def crossing(self, plan: Plan, num_samples: int, profile: DeviceProfile) -> StreamCharge:
        """What the stream of a plan takes on a device with so many samples, alone on its links and at its host."""
        split = plan.split
        if split is None:
            return NO_STREAM
        work = self.work(plan, num_samples)
        assert work is not None
        up, down = self._sizes(plan, work)
        way = route(self._fleet, profile, msgspec.structs.replace(split, host=0))  # hosts are alike
        key = work, way, profile.flop_per_s
        found = self._alone.get(key)
        if found is None or found[:2] != (up, down):
            load = work.load(up, down, flop_per_s=profile.flop_per_s, host_flop_per_s=self._fleet.hosts.flop_per_s)
            seconds = alone(load, way, self._fleet)
            found = self._alone[key] = up, down, charged(load, seconds, flop_per_s=profile.flop_per_s)
        return found[2]

    def observe(self, plan: Plan, num_samples: int, up: Sequence[int], down: Sequence[int]) -> None:
        """The packets of a stream were that large: those of the next one of its kind will be about as large."""
        work = self.work(plan, num_samples)
        if work is None or work.replay or not up:
            return
        samples = sum(work.samples[: len(up)])
        self._observed[self._kind(plan)] = sum(up) / samples, sum(down) / samples

    def _micro_batches(self, num_samples: int, training: Training) -> tuple[int, ...]:
        """Samples of each micro-batch."""
        key = num_samples, training.batch_size, training.accumulation, training.epochs, training.steps
        if key not in self._samples:
            self._samples[key] = tuple(each.samples for each in schedule(num_samples, training))
        return self._samples[key]

    def _sizes(self, plan: Plan, work: Work) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes of each packet, up and down."""
        if work.replay:
            return work.nothing_sent, ()
        assert plan.split is not None
        directions = [plan.split.codec_up, plan.split.codec_down] if work.answers else [plan.split.codec_up]
        found = []
        for direction, codec in enumerate(directions):
            of = {
                samples: self._size(plan, direction, codec, samples, work.samples[0]) for samples in set(work.samples)
            }
            found.append(tuple(of[samples] for samples in work.samples))
        return found[0], found[1] if work.answers else ()

    def _size(self, plan: Plan, direction: int, chain: tuple[CodecSpec, ...], samples: int, usual: int) -> int:
        """Bytes of the packet of a micro-batch: known, as observed, or as of random numbers. ``usual``: samples of most."""
        kind = self._kind(plan)
        if kind not in self._streams:
            self._streams[kind] = ActivationStream(plan, self._workload)
        codec, expected = make_codec(chain), self._streams[kind].packets(samples)[direction]
        bound, exact = sealed_bytes(codec, expected)
        if exact:
            return bound
        if kind not in self._observed:
            self._observed[kind] = self._typical(plan, usual)
        return min(bound, round(self._observed[kind][direction] * samples))

    def _typical(self, plan: Plan, samples: int) -> tuple[float, float]:
        """Bytes per sample of packets of random numbers; of what holds none, its bound."""
        assert plan.split is not None
        expected = self._streams[self._kind(plan)].packets(samples)
        chains = plan.split.codec_up, plan.split.codec_down
        up, down = (_typical(chain, specs) / samples for chain, specs in zip(chains, expected, strict=True))
        return up, down

    def _kind(self, plan: Plan) -> tuple[Any, ...]:
        """Streams that are alike: by cut and codecs, and what a sample weighs in them."""
        split, training = plan.split, plan.training
        assert split is not None
        return (plan.part.blocks, plan.part.index_map, repr(split.codec_up), repr(split.codec_down),
                split.mode, training.batch_size, training.accumulation, training.precision)  # fmt: skip


def _typical(chain: tuple[CodecSpec, ...], specs: tuple[ArraySpec, ...]) -> int:
    codec = make_codec(chain)
    drawn = tuple(spec for spec in specs if spec.role == "activation")
    others = tuple(spec for spec in specs if spec.role != "activation")
    found = typical_bytes(codec, drawn)
    return found + sum(spec.num_bytes for spec in codec.layout(others))


def alone(load: Load, way: Route, fleet: Fleet) -> float:
    """Seconds of a stream that has its links and its host to itself: the clock's own code, with nothing else in it."""
    up, down = Links(capacities(fleet, "up")), Links(capacities(fleet, "down"))
    streams = Streams(up=up, down=down)
    streams.begin(0, load, way, now_s=0.0)
    while True:
        changes = enumerate((down.first(), up.first(), streams.first()))
        time_s, source = min((change[0], number) for number, change in changes if change is not None)
        if source < 2:
            streams.landed(0, "up" if source else "down", now_s=time_s)
        elif (seconds := streams.change()) is not None:
            return seconds
