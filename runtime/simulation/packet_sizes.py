"""Sizes of the packets between server and devices: exact for codecs of fixed size, as last observed or estimated for others.

A codec whose output depends on the data promises an upper bound only. A sparse, entropy-coded message takes a fifth of that
or less, so a policy that chose by bounds would never try such a codec, and its size would never be observed. Before the
first observation the estimate is therefore the size of coded random numbers of the same shapes. Independent normal values
lack the structure that coders exploit: real updates took 3 to 35 % less, at densities of 0.25 to 10 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...actors.messages.messages import array_specs, update_tensors
from ...comms.codec import Arrays, ArraySpec, Codec, NumBytes, needs_reference
from ...comms.codecs.make_codec import make_codec
from ...comms.ledger import Direction
from ...comms.links.predict import residual_specs
from ...comms.links.receive import context_for
from ...comms.packet import PacketKind, Stamp, seal, sealed_bytes
from ...learning.parts.part import Part
from ...learning.parts.submodel import SubModel
from ...policies.plan import Plan


@dataclass
class _Format:
    """Packets of equal contents and codec. ``expected``: before the codec; ``num_bytes`` None: the size depends on the data."""

    codec: Codec
    expected: tuple[ArraySpec, ...]
    num_bytes: int | None


class PacketSizes:
    """Packet sizes by direction, part and codecs."""

    # In a checkpoint: observed sizes decide estimates.
    SAVED: ClassVar = {"_observed": dict[tuple[Any, ...], NumBytes]}
    NOT_SAVED = ("_submodel", "_formats")

    def __init__(self, submodel: Callable[[Part], SubModel]) -> None:
        """Nothing is observed yet."""
        self._submodel = submodel
        self._formats: dict[tuple[Any, ...], _Format] = {}
        self._observed: dict[tuple[Any, ...], int] = {}  # only of formats whose size depends on the data

    def num_bytes(self, plan: Plan, direction: Direction) -> int:
        """The size of a plan's packet; 0 where none is sent: the device trains nothing, or needs no tensors."""
        if not plan.trains_on_device:
            return 0
        key, packets = self._format(plan, direction)
        if direction == "down" and not packets.expected:
            return 0
        if packets.num_bytes is not None:
            return packets.num_bytes
        if key not in self._observed:
            self._observed[key] = typical_bytes(packets.codec, packets.expected)
        return self._observed[key]

    def observe(self, plan: Plan, direction: Direction, num_bytes: int) -> None:
        """Record the size of a packet; later ones of the same format are estimated at it."""
        key, packets = self._format(plan, direction)
        if packets.num_bytes is None:
            self._observed[key] = num_bytes

    def _format(self, plan: Plan, direction: Direction) -> tuple[tuple[Any, ...], _Format]:
        """The format of a plan's packet, with its key, which leaves out the rule of prediction: it changes sizes little."""
        down = direction == "down"
        codec, link = (plan.codec_down, plan.link_down) if down else (plan.codec_up, plan.link_up)
        arithmetic = link.arithmetic if link else "float"
        part = plan.part.shape
        contents = "" if down else f"{plan.objective.kind} {plan.upload.statistics}"
        key = direction, part.key, repr(codec), arithmetic, contents
        if key not in self._formats:
            submodel = self._submodel(part)
            expected = array_specs(submodel.down if down else update_tensors(plan, submodel))
            expected = residual_specs(expected, link) if link else expected
            made = make_codec(codec)
            num_bytes, exact = sealed_bytes(made, expected)
            self._formats[key] = _Format(made, expected, num_bytes if exact else None)
        return key, self._formats[key]


def typical_bytes(codec: Codec, expected: tuple[ArraySpec, ...]) -> int:
    """Bytes of a packet of normally distributed ``expected`` arrays; the codec's bound where one of them holds integers.

    (Integers are bit patterns of residuals, coded without loss: their size depends on how good the prediction will be.)
    """
    if any(np.dtype(spec.dtype).kind != "f" for spec in expected):
        return sealed_bytes(codec, expected)[0]
    rng = np.random.default_rng(0)
    drawn, reference = _normal(expected, rng), _normal(expected, rng) if needs_reference(codec) else {}
    context = context_for(expected, seed=0, reference=reference)
    packet, _ = seal(drawn, codec=codec, context=context, stamp=Stamp(kind=PacketKind.UPDATE))
    return packet.nbytes


def _normal(expected: tuple[ArraySpec, ...], rng: np.random.Generator) -> Arrays:
    """Normally distributed arrays of these specifications."""
    return {spec.name: rng.standard_normal(spec.shape, np.float32).astype(spec.dtype, copy=False) for spec in expected}
