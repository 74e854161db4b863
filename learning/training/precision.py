"""Precision and memory format of the computation, and whether bf16 pays on this processor.

With matrix units bf16 is faster than float32; emulated it is many times slower.
"""

import time

import torch
from torch import Tensor, nn

from ..randomness import seeded
from ..spec import Precision

_REPETITIONS = 3
_LEAST_GAIN = 1.1  # below it bf16 costs accuracy without a benefit


def autocast(precision: Precision) -> torch.autocast:
    """Autocast to bfloat16 on the CPU, enabled for "bf16" only."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def in_memory_format(inputs: Tensor, *, channels_last: bool) -> Tensor:
    """Inputs in channels_last format if asked for and if they have four axes, else unchanged."""
    if channels_last and inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def bf16_gain() -> float:
    """Seconds of a training step in float32 divided by those under bf16 autocast, with torch's current number of threads.

    The step is one of a convolution and a fully connected layer on 8 images of 16 x 16, which takes milliseconds. The best of
    three is taken of each, after one warm-up step.
    """
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 256, 64))
        images = torch.randn(8, 16, 16, 16)
    float32_s, bf16_s = (_step_s(model, images, bf16=bf16) for bf16 in (False, True))
    return float32_s / bf16_s


def bf16_pays(gain: float) -> bool:
    """Whether bf16 is worth its loss of accuracy at this gain."""
    return gain >= _LEAST_GAIN


def _step_s(model: nn.Module, images: Tensor, *, bf16: bool) -> float:
    """Seconds of the fastest step."""
    seconds = []
    for _ in range(1 + _REPETITIONS):
        start = time.perf_counter()
        with autocast("bf16" if bf16 else "float32"):
            output = model(images)
        output.float().square().mean().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
