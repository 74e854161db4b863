"""The charges: seconds of a transfer and of a computation. Estimates and the virtual clock both use these, and only these.

    down_s    = latency + bytes down / rate        rate = the device's own, or the shared link's where that is less
    compute_s = training FLOPs per sample x samples processed / sustained FLOP/s
    up_s      = latency + bytes up / rate
    stream_s  = what a stream through a cut takes beyond the device's own computing (``runtime/simulation/streams.py``)

The server's own link counts as shared, where it is limited; so do those of the partition hosts.
"""

from dataclasses import dataclass

from ..clusters.profile import DeviceProfile
from .report import Estimate


def transfer_s(num_bytes: int, *, bytes_per_s: float, latency_s: float) -> float:
    """Seconds that one message takes alone on its way."""
    return latency_s + num_bytes / bytes_per_s


def compute_s(flops: int, *, flop_per_s: float) -> float:
    """Seconds that a computation takes."""
    return flops / flop_per_s


@dataclass(frozen=True, kw_only=True)
class StreamCharge:
    """What a stream through the cut came to: bytes each way, the host's FLOPs, and the seconds it adds to the device's own."""

    up_bytes: int = 0
    down_bytes: int = 0
    host_flops: int = 0
    seconds: float = 0.0


NO_STREAM = StreamCharge()


def charge(
    profile: DeviceProfile,
    *,
    down_bytes: int,
    flops: int,
    up_bytes: int,
    peak_memory_bytes: int,
    down_s: float,
    up_s: float,
    crossing: StreamCharge = NO_STREAM,
) -> Estimate:
    """The record of one plan, from its bytes, its FLOPs and the seconds of its two transfers and its stream."""
    train_s = compute_s(flops, flop_per_s=profile.flop_per_s)
    return Estimate(
        down_s=down_s,
        compute_s=train_s,
        stream_s=crossing.seconds,
        up_s=up_s,
        seconds=down_s + train_s + crossing.seconds + up_s,
        down_bytes=down_bytes + crossing.down_bytes,
        up_bytes=up_bytes + crossing.up_bytes,
        flops=flops,
        host_flops=crossing.host_flops,
        peak_memory_bytes=peak_memory_bytes,
        energy_j=(profile.watts or 0.0) * train_s,
    )
