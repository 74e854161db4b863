"""What streams to partition hosts cost: FLOPs at both ends, packet sizes, and the seconds of a stream that is alone.

Packets of codecs whose output depends on the data are estimated at the bytes per sample of the last similar stream, and
before the first one at those of random numbers (``packet_sizes``).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec

from ...actors.messages.stream import ActivationStream
from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...comms.codec import ArraySpec, CodecSpec
from ...comms.codecs.make_codec import make_codec
from ...comms.packet import sealed_bytes
from ...learning.spec import NonNegative, PartCost, Training
from ...learning.training.split import micro_batch_schedule
from ...learning.workload import Workload
from ...policies.estimate import NO_STREAM, StreamCharge
from ...policies.plan import Plan
from .network_links import NetworkLinks, capacities
from .packet_sizes import typical_bytes
from .stream_load import Load, StreamPath, Work, charged, route
from .streams import Streams

Key = TypeVar("Key")
Value = TypeVar("Value")
Row = Callable[..., PartCost]
_MAX_CACHED = 1000  # sequences of micro-batches, and streams: devices that stop early make arbitrarily many


class BoundedCache(OrderedDict[Key, Value]):
    """A mapping of values that can be computed again: beyond ``most`` entries the one that was inserted first is dropped."""

    def __init__(self, most: int) -> None:
        """Empty."""
        super().__init__()
        self._most = most

    def __setitem__(self, key: Key, value: Value) -> None:
        """Insert or replace an entry."""
        super().__setitem__(key, value)
        if len(self) > self._most:
            self.popitem(last=False)


class StreamCosts:
    """Work and packets of split plans, cached by what they depend on."""

    SAVED: ClassVar = {"_observed": dict[tuple[Any, ...], tuple[NonNegative, NonNegative]]}  # in a checkpoint
    NOT_SAVED = ("_workload", "_fleet", "_row", "_samples", "_streams", "_uncontended")

    def __init__(self, workload: Workload, fleet: Fleet, *, row: Row) -> None:
        """``row``: the cost of a part under a training setting (``Costs.row``)."""
        self._workload, self._fleet, self._row = workload, fleet, row
        self._samples = BoundedCache[tuple[Any, ...], tuple[int, ...]](_MAX_CACHED)
        self._streams: dict[tuple[Any, ...], ActivationStream] = {}
        self._observed: dict[tuple[Any, ...], tuple[float, float]] = {}  # bytes per sample, up and down
        self._uncontended = BoundedCache[tuple[Any, ...], tuple[Sequence[int], Sequence[int], StreamCharge]](
            _MAX_CACHED
        )

    def work(self, plan: Plan, num_samples: int) -> Work | None:
        """What a split plan computes on a device with so many samples; None for a plan that is not split.

        Raises ``ValueError`` for a model that cannot be cut.
        """
        split, training = plan.split, plan.training
        if split is None:
            return None
        if fault := self._workload.architecture(plan.part.shape).cut_fault:
            raise ValueError(f"split.cut is {split.cut!r}, but the model cannot be cut: {fault}")
        answers = split.method.returns_gradients
        others = self._workload.submodel(plan.part.shape).rest(frozen_to=split.depth)
        host = self._row(others, training, entering_gradient=answers)
        replay = split.replays
        device = None if replay else self._row(plan.part, training)
        # Without its head, which runs after the packet is sent.
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
        """Micro-batches that a device with so many samples holds at once while it waits for their gradients."""
        if plan.split is None or not plan.split.method.returns_gradients or plan.split.window == 1:
            return 1
        return max(1, min(plan.split.window, len(self._micro_batches(num_samples, plan.training))))

    def crossing(self, plan: Plan, num_samples: int, profile: DeviceProfile) -> StreamCharge:
        """The charge for a plan's stream on a device with so many samples, alone on its links and at its host."""
        split = plan.split
        if split is None:
            return NO_STREAM
        work = self.work(plan, num_samples)
        assert work is not None
        up, down = self._sizes(plan, work)
        path = route(self._fleet, profile, msgspec.structs.replace(split, host=0))  # all hosts are equal
        key = work, path, profile.flop_per_s
        cached = self._uncontended.get(key)
        if cached is None or cached[:2] != (up, down):
            load = work.load(up, down, flop_per_s=profile.flop_per_s, host_flop_per_s=self._fleet.hosts.flop_per_s)
            seconds = uncontended_seconds(load, path, self._fleet)
            cached = self._uncontended[key] = up, down, charged(load, seconds, flop_per_s=profile.flop_per_s)
        return cached[2]

    def observe(self, plan: Plan, num_samples: int, up: Sequence[int], down: Sequence[int]) -> None:
        """Record the packet sizes of a stream, for estimates of similar ones."""
        work = self.work(plan, num_samples)
        if work is None or work.replay or not up:
            return
        samples = sum(work.samples[: len(up)])
        self._observed[self._key(plan)] = sum(up) / samples, sum(down) / samples

    def _micro_batches(self, num_samples: int, training: Training) -> tuple[int, ...]:
        """Samples of each micro-batch."""
        key = num_samples, training.batch_size, training.accumulation, training.epochs, training.steps
        if key not in self._samples:
            self._samples[key] = tuple(each.samples for each in micro_batch_schedule(num_samples, training))
        return self._samples[key]

    def _sizes(self, plan: Plan, work: Work) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes of each packet, up and down."""
        if work.replay:
            return work.nothing_sent, ()
        assert plan.split is not None
        codecs = [plan.split.codec_up, plan.split.codec_down] if work.answers else [plan.split.codec_up]
        sizes = []
        for direction, codec in enumerate(codecs):
            by_samples = {
                samples: self._size(plan, direction, codec, samples, work.samples[0]) for samples in set(work.samples)
            }
            sizes.append(tuple(by_samples[samples] for samples in work.samples))
        return sizes[0], sizes[1] if work.answers else ()

    def _size(self, plan: Plan, direction: int, chain: tuple[CodecSpec, ...], samples: int, usual: int) -> int:
        """Bytes of a micro-batch's packet: exact, as observed, or of random numbers. ``usual``: samples of most of them."""
        key = self._key(plan)
        if key not in self._streams:
            self._streams[key] = ActivationStream(msgspec.structs.replace(plan, part=plan.part.shape), self._workload)
        codec, expected = make_codec(chain), self._streams[key].packets(samples)[direction]
        bound, exact = sealed_bytes(codec, expected)
        if exact:
            return bound
        if key not in self._observed:
            self._observed[key] = self._typical(plan, usual)
        return min(bound, round(self._observed[key][direction] * samples))

    def _typical(self, plan: Plan, samples: int) -> tuple[float, float]:
        """Bytes per sample of packets of random numbers, up and down; bounds for arrays that are not activations."""
        assert plan.split is not None
        expected = self._streams[self._key(plan)].packets(samples)
        chains = plan.split.codec_up, plan.split.codec_down
        up, down = (_typical(chain, specs) / samples for chain, specs in zip(chains, expected, strict=True))
        return up, down

    def _key(self, plan: Plan) -> tuple[Any, ...]:
        """What the packet sizes of a stream depend on: cut, codecs and training setting."""
        split, training = plan.split, plan.training
        assert split is not None
        part = plan.part
        return (part.model, part.width, part.min_channels, part.blocks, repr(split.codec_up), repr(split.codec_down),
                split.mode, training.batch_size, training.accumulation, training.precision)  # fmt: skip


def _typical(chain: tuple[CodecSpec, ...], specs: tuple[ArraySpec, ...]) -> int:
    codec = make_codec(chain)
    activations = tuple(spec for spec in specs if spec.role == "activation")
    others = tuple(spec for spec in specs if spec.role != "activation")
    return typical_bytes(codec, activations) + sum(spec.num_bytes for spec in codec.layout(others))


def uncontended_seconds(load: Load, path: StreamPath, fleet: Fleet) -> float:
    """Seconds of a stream that has its links and its host to itself, by the same code that the clock runs."""
    up, down = NetworkLinks(capacities(fleet, "up")), NetworkLinks(capacities(fleet, "down"))
    streams = Streams(up=up, down=down)
    streams.begin(0, load, path, now_s=0.0)
    while True:
        changes = enumerate((down.first(), up.first(), streams.first()))
        time_s, source = min((change[0], number) for number, change in changes if change is not None)
        if source < 2:
            streams.landed(0, "up" if source else "down", now_s=time_s)
        elif (seconds := streams.change()) is not None:
            return seconds
