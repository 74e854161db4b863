"""How activations are coded: a step for each channel, unsigned codes where nothing is negative, then entropy coding.

EcoFed (Wu et al., IEEE TPDS 2024, arXiv 2304.05495) has signed 8 bit codes with one step for the whole tensor, and no entropy
coding. Labels are not coded by the grid.
"""

from typing import Annotated

import msgspec

from ...comms.codec import CodecSpec

Bits = Annotated[int, msgspec.Meta(ge=0, le=8)]


def check_bits(bits: int) -> None:
    """Raise ``ValueError`` for the one number that is no code."""
    if bits == 1:
        raise ValueError("bits is 1; it must be 0 or between 2 and 8")


def activation_codec(bits: int) -> tuple[CodecSpec, ...]:
    """The chain for codes of so many bits; 0: float32, not coded at all."""
    if not bits:
        return ()
    grid = {"bits": bits, "signed": "auto", "granularity": "channel", "roles": ["activation"]}
    return (CodecSpec("uniform", grid), CodecSpec("entropy"))
