"""How fast this processor trains in bf16, against float32: with matrix units faster, emulated many times slower."""

import time

import torch
from torch import nn

from ..randomness import seeded

_REPETITIONS = 3
_LEAST_GAIN = 1.1  # below it bf16 costs accuracy for nothing


def bf16_gain() -> float:
    """Seconds of a training step in float32 over those under bf16 autocast, on the calling thread's share of the processor.

    The step is one of a convolution and a fully connected layer on 8 images of 16 x 16, which takes milliseconds; the best of
    three is taken of each, after one that is not counted.
    """
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 256, 64))
        images = torch.randn(8, 16, 16, 16)
    float32_s, bf16_s = (_step_s(model, images, bf16=bf16) for bf16 in (False, True))
    return float32_s / bf16_s


def pays(gain: float) -> bool:
    """Whether bf16 is worth it at this gain."""
    return gain >= _LEAST_GAIN


def _step_s(model: nn.Module, images: torch.Tensor, *, bf16: bool) -> float:
    """Seconds of the fastest step."""
    taken = []
    for _ in range(1 + _REPETITIONS):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = model(images)
        output.float().square().mean().backward()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
