"""What one stream between a device and its partition host is: its way, its packets, and what they make both ends compute."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from ...learning.spec import Count, CountOrZero, NonNegative, Positive
from ...policies.estimate import StreamCharge, compute_s
from ...policies.plan import Split
from .links import Link, crossed, host_link


@dataclass(frozen=True, kw_only=True)
class Route:
    """A device's way to a host: latency of a message in seconds, its own rates in bytes/s, shared links, the host's number."""

    host: CountOrZero = 0
    latency_s: NonNegative = 0.0
    up_rate: Positive = float("inf")
    down_rate: Positive = float("inf")
    up_links: tuple[Link, ...] = ()
    down_links: tuple[Link, ...] = ()


def route(fleet: Fleet, profile: DeviceProfile, split: Split) -> Route:
    """The way of a split plan's stream. That of a replay has no length: what it needs is at the host."""
    if split.replays:
        return Route(host=split.host)
    end = host_link(split.host)
    return Route(
        host=split.host,
        latency_s=profile.latency_s,
        up_rate=profile.up_bytes_per_s,
        down_rate=profile.down_bytes_per_s,
        up_links=crossed(fleet, profile, "up", to=end),
        down_links=crossed(fleet, profile, "down", to=end),
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a stream carries and has computed, by micro-batch: bytes of its packets, and the seconds of their computations.

    ``rest_s``: of the device, beside its forward pass. ``down`` is empty where nothing is answered. ``flops`` are the
    device's, ``host_flops`` the host's, of all together.
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
    """What a split plan's stream makes device and host compute: samples of each micro-batch, and FLOPs for each sample.

    ``forward_flops`` of the device's ``flops`` come before a micro-batch is sent. A ``replay`` has no device: its
    micro-batches are at the host, which takes the next when it is done with one.
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
        """Bytes of the packets of a replay."""
        return (0,) * len(self.samples)

    def load(self, up: Sequence[int], down: Sequence[int], *, flop_per_s: float, host_flop_per_s: float) -> Load:
        """With packets of these sizes: fewer than micro-batches if the stream broke off, and then no more is computed."""
        num = min(len(self.samples), len(up), len(down) if self.answers else len(up))
        samples = self.samples[:num]

        def seconds(flops: int, speed: float) -> list[float]:
            of = {size: compute_s(size * flops, flop_per_s=speed) for size in set(samples)}
            return [of[size] for size in samples]

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
    """The record of a stream that took ``seconds``, the device's own computing among them."""
    waited = max(0.0, seconds - compute_s(load.flops, flop_per_s=flop_per_s))
    return StreamCharge(up_bytes=sum(load.up), down_bytes=sum(load.down), host_flops=load.host_flops, seconds=waited)
