"""The cost of a plan: bytes, FLOPs, seconds and memory. Estimates and the virtual clock use the same formulas.

    down_s    = latency + bytes down / rate        rate: that of the device's link, or of its shared link where that is less
    compute_s = training FLOPs per sample x samples processed / sustained FLOP/s
    up_s      = latency + bytes up / rate
    stream_s  = seconds that a stream through a cut adds to the device's computing (``runtime/simulation/streams.py``)

The links of the server and of the partition hosts count as shared links where their rates are limited.
"""

from dataclasses import dataclass

import msgspec

from ..clusters.profile import DeviceProfile


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of a plan on a device: predicted before dispatch, and charged by the virtual clock, by the same code.

    ``seconds`` = ``down_s`` + ``compute_s`` + ``stream_s`` + ``up_s``. Bytes are those of the packets, including the stream to
    a partition host. ``stream_s``: seconds in which the device waits for packets that cross the cut, and for the host, whose
    work is ``host_flops``. ``parameters``: of the blocks that the device holds. ``energy_j`` is 0 where the profile has no
    ``watts``.
    """

    down_s: float = 0.0
    compute_s: float = 0.0
    stream_s: float = 0.0
    up_s: float = 0.0
    seconds: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0
    flops: int = 0
    host_flops: int = 0
    peak_memory_bytes: int = 0
    parameters: int = 0
    energy_j: float = 0.0


def transfer_s(num_bytes: int, *, bytes_per_s: float, latency_s: float) -> float:
    """Seconds that one message takes on an otherwise idle link."""
    return latency_s + num_bytes / bytes_per_s


def compute_s(flops: int, *, flop_per_s: float) -> float:
    """Seconds that a computation takes."""
    return flops / flop_per_s


@dataclass(frozen=True, kw_only=True)
class StreamCharge:
    """The cost of a stream through a cut: bytes each way, the host's FLOPs, and the seconds added to the device's own."""

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
    parameters: int = 0,
    down_s: float,
    up_s: float,
    crossing: StreamCharge = NO_STREAM,
) -> Estimate:
    """The estimate of one plan, from its bytes, its FLOPs and the seconds of its two transfers and its stream."""
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
        parameters=parameters,
        energy_j=(profile.watts or 0.0) * train_s,
    )
