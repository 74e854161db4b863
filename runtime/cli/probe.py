"""``fedbonsai probe``: measures this machine, and prints it as a fleet class.

Speed is what a fleet means by it: FLOP/s that training sustains, measured by a short real training of the ``small``
convolutional network (``learning.models.cnn``), with FLOPs counted as costs count them (``learning.costs.flops``). The link
cannot be measured from one end: the user has to fill it in.
"""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...clusters.units import format_quantity
from ...learning.costs.flops import FlopCounter
from ...learning.models.cnn import small

BF16_SHARE = 1 / 3  # of the measuring time


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """``flop_per_s``: sustained in float32. ``bf16_gain``: how many times as fast bf16 autocast trained.

    ``memory_bytes``: available for training now (None: unknown on this system).
    """

    flop_per_s: float
    bf16_gain: float
    memory_bytes: int | None
    threads: int
    batch_size: int
    steps: int


def probe(*, seconds: float = 3.0, threads: int = 1, batch_size: int = 32) -> Measurement:
    """Train for about ``seconds`` on ``threads`` threads; the process's number of threads is restored afterwards."""
    with _threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (batch_size,), generator=generator)
        counter = FlopCounter()
        with counter:
            nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]  # of torch
        flops = counter.total
        steps, taken_s = _train(model, images, labels, seconds=seconds * (1 - BF16_SHARE), bf16=False)
        bf16_steps, bf16_s = _train(model, images, labels, seconds=seconds * BF16_SHARE, bf16=True)
    return Measurement(
        flop_per_s=flops * steps / taken_s,
        bf16_gain=(bf16_steps / bf16_s) / (steps / taken_s),
        memory_bytes=available_memory_bytes(),
        threads=threads,
        batch_size=batch_size,
        steps=steps + bf16_steps,
    )


def render_yaml(measured: Measurement) -> str:
    """A fleet of one device, which ``load_fleet`` reads; figures that were not measured are marked."""
    memory, source = measured.memory_bytes, "free now"
    if memory is None:
        memory, source = 10**9, "ASSUMPTION: this system does not say"
    speed, batch = format_quantity(measured.flop_per_s, kind="flop_per_s"), measured.batch_size
    return f"""\
# Measured by `fedbonsai probe`: {platform.machine()}, torch {torch.__version__}, threads {measured.threads}, batch {batch}.
description: This machine, measured

classes:
  - name: this-machine
    count: 1
    flop_per_s: {speed}  # sustained by training in float32; in bf16 {measured.bf16_gain:.2f} times as much
    memory_bytes: {format_quantity(max(memory, 1), kind="bytes")}  # {source}
    up_bytes_per_s: 20 Mbit/s  # NOT MEASURED: put in this device's link
    down_bytes_per_s: 50 Mbit/s  # NOT MEASURED
    latency_s: 10 ms  # NOT MEASURED
"""


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Available memory, within the limit of the control group (a container's) if there is one. None except on Linux."""
    meminfo = proc / "meminfo"
    if not meminfo.is_file():
        return None
    figures = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(figures["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(most) - int(used.read_text())))
    return available


def _train(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, seconds: float, bf16: bool
) -> tuple[int, float]:
    """Steps done, and the seconds that they took; at least one step, after one to warm up."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimiser.step()

    step()
    steps, start_s = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start_s < seconds:
        step()
        steps += 1
    return steps, time.perf_counter() - start_s


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use ``count`` torch threads in this context."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
