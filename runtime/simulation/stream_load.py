"""What one stream between a device and its partition host consists of: its route, its packets, and the work at both ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...learning.spec import Count, CountOrZero, NonNegative, Positive
from ...policies.estimate import StreamCharge, compute_s
from ...policies.plan import Split
from .network_links import LinkId, crossed_links, host_link


@dataclass(frozen=True, kw_only=True)
class StreamPath:
    """From a device to a host: seconds of latency per message, the device's rates in bytes/s, shared links, host number."""

    host: CountOrZero = 0
    latency_s: NonNegative = 0.0
    up_rate: Positive = float("inf")
    down_rate: Positive = float("inf")
    up_links: tuple[LinkId, ...] = ()
    down_links: tuple[LinkId, ...] = ()


def route(fleet: Fleet, profile: DeviceProfile, split: Split) -> StreamPath:
    """The route of a split plan's stream. A replay's takes no time: its views are at the host already."""
    if split.replays:
        return StreamPath(host=split.host)
    end = host_link(split.host)
    return StreamPath(
        host=split.host,
        latency_s=profile.latency_s,
        up_rate=profile.up_bytes_per_s,
        down_rate=profile.down_bytes_per_s,
        up_links=crossed_links(fleet, profile, "up", to=end),
        down_links=crossed_links(fleet, profile, "down", to=end),
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """By micro-batch: bytes of the stream's packets, and the seconds that each end computes.

    ``forward_s``, ``rest_s``: the device's forward pass, and all else that it computes. ``down`` is empty where the host
    returns nothing (``answers``). ``flops``, ``host_flops``: totals of the device and of the host. ``window``: packets that
    may be outstanding.
    """

    up: Sequence[CountOrZero]
    down: Sequence[CountOrZero]
    forward_s: Sequence[NonNegative]
    rest_s: Sequence[NonNegative]
    host_s: Sequence[NonNegative]
    flops: CountOrZero
    host_flops: CountOrZero
    window: Count
    answers: bool


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a split plan computes: the samples of each micro-batch, and the FLOPs for each sample.

    ``forward_flops``: those of the device's ``flops`` that come before a micro-batch is sent. ``replay``: no device takes
    part; the host trains on views that it has buffered, one micro-batch after another.
    """

    samples: tuple[CountOrZero, ...]
    forward_flops: CountOrZero
    flops: CountOrZero
    host_flops: CountOrZero
    window: Count = 1
    answers: bool = True
    replay: bool = False

    @property
    def nothing_sent(self) -> tuple[int, ...]:
        """Packet sizes of a replay: 0 for each micro-batch."""
        return (0,) * len(self.samples)

    def load(self, up: Sequence[int], down: Sequence[int], *, flop_per_s: float, host_flop_per_s: float) -> Load:
        """The load with packets of these sizes. A stream that broke off has fewer than micro-batches: the rest is left out."""
        num = min(len(self.samples), len(up), len(down) if self.answers else len(up))
        samples = self.samples[:num]

        def seconds(flops: int, speed: float) -> list[float]:
            by_size = {size: compute_s(size * flops, flop_per_s=speed) for size in set(samples)}
            return [by_size[size] for size in samples]

        return Load(
            up=up[:num],
            down=down[:num],
            forward_s=seconds(self.forward_flops, flop_per_s),
            rest_s=seconds(self.flops - self.forward_flops, flop_per_s),
            host_s=seconds(self.host_flops, host_flop_per_s),
            flops=self.flops * sum(samples),
            host_flops=self.host_flops * sum(samples),
            window=self.window,
            answers=self.answers,
        )


def charged(load: Load, seconds: float, *, flop_per_s: float) -> StreamCharge:
    """The charge for a stream that took ``seconds`` in all; only what the device's own computing does not explain counts."""
    waited = max(0.0, seconds - compute_s(load.flops, flop_per_s=flop_per_s))
    return StreamCharge(up_bytes=sum(load.up), down_bytes=sum(load.down), host_flops=load.host_flops, seconds=waited)
