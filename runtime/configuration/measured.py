"""What is measured on the machine once, before the first round, and decides something from then on.

A run measures only what its configuration leaves open (``training.precision: auto``). The result is part of the run: it is in
the first event (``RunStarted.measured``) and in the run folder (``measured.json``), and a run that is resumed takes it from
there, so that it goes on to the same bits.
"""

import msgspec
from msgspec.structs import replace

from .config import Config


class MachineMeasurements(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``bf16_gain``: how many times faster bf16 autocast trains than float32 (``learning.precision``); None: not measured."""

    bf16_gain: float | None = None


def measure(config: Config) -> MachineMeasurements:
    """What ``config`` needs to know of this machine."""
    if config.training.precision == "float32":
        return MachineMeasurements()
    from ...learning.training.precision import bf16_gain  # here, since it imports torch

    return MachineMeasurements(bf16_gain=round(bf16_gain(), 3))


def settle(config: Config, measured: MachineMeasurements) -> Config:
    """``config`` with what it left open decided by what was measured."""
    if config.training.precision != "auto" or measured.bf16_gain is None:
        return config
    from ...learning.training.precision import pays

    precision = "bf16" if pays(measured.bf16_gain) else "float32"
    return replace(config, training=replace(config.training, precision=precision))


def advise(config: Config, measured: MachineMeasurements) -> list[str]:
    """What an operator should know of settled settings on this machine."""
    gain = measured.bf16_gain
    if config.training.precision != "bf16" or gain is None or gain >= 1:
        return []
    return [
        f"training.precision is 'bf16', which this processor emulates: a training step takes about {1 / gain:.0f} times as "
        "long as in float32; allowed: float32, or auto, which takes bf16 only where it is faster"
    ]
