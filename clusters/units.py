"""Quantities as people write them: ``20 Mbit/s``, ``512 MB``, ``3.2 GFLOP/s``, ``15 ms``. A bare number is in base units.

Decimal and binary prefixes are distinguished (1 kB = 1000 B, 1 KiB = 1024 B) and the arithmetic is exact: the number is read
as a fraction, multiplied, and rounded once. Bits become bytes: 8 Mbit/s are 1 MB/s.
"""

import re
from fractions import Fraction
from typing import Literal

Kind = Literal["bytes", "bytes_per_s", "flop_per_s", "s", "watts"]

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_BYTES: dict[str, Fraction] = {f"{p}B": Fraction(v) for p, v in (_DECIMAL | _BINARY).items()} | {"KB": Fraction(1000)}
_BITS: dict[str, Fraction] = {f"{p}bit": Fraction(v, 8) for p, v in _DECIMAL.items()}

UNITS: dict[Kind, dict[str, Fraction]] = {
    "bytes": _BYTES,
    "bytes_per_s": {f"{unit}/s": factor for unit, factor in (_BYTES | _BITS).items()},
    "flop_per_s": {f"{p}FLOP/s": Fraction(v) for p, v in _DECIMAL.items()},
    "s": {
        "s": Fraction(1),
        "ms": Fraction(1, 10**3),
        "us": Fraction(1, 10**6),
        "ns": Fraction(1, 10**9),
        "min": Fraction(60),
        "h": Fraction(3600),
    },
    "watts": {"W": Fraction(1), "mW": Fraction(1, 1000), "kW": Fraction(1000)},
}
_BASE: dict[Kind, str] = {"bytes": "B", "bytes_per_s": "B/s", "flop_per_s": "FLOP/s", "s": "s", "watts": "W"}
_ALSO: dict[Kind, str] = {
    "bytes": "512 MB or 4 GiB",
    "bytes_per_s": "20 Mbit/s or 2.5 MB/s",
    "flop_per_s": "3.2 GFLOP/s",
    "s": "15 ms",
    "watts": "10 W",
}
# No device is outside these limits, and within them sums and quotients of simulated time stay in the range of a float.
LIMITS: dict[Kind, tuple[float, float]] = {
    "bytes": (0, 2**60),
    "bytes_per_s": (1e-3, 1e18),
    "flop_per_s": (1, 1e24),
    "s": (1e-12, 1e12),
    "watts": (1e-9, 1e9),
}
# Exponents have at most 3 digits: the exact integer of a longer one would exhaust the memory.
_QUANTITY = re.compile(r"\s*([+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][+-]?\d{1,3})?)\s*(\S*)\s*")


def parse_quantity(value: object, *, kind: Kind, field: str) -> int | float:
    """``value`` in base units: an int for "bytes", otherwise a float. Zero and negative numbers are left to the caller.

    ``value`` is a number in base units, or a string of number and unit. Raises ``ValueError`` naming ``field``, the value
    and what is allowed, for a unit of another kind or unknown, for a fraction of a byte, and for a number above 0 that is
    outside ``LIMITS``.
    """
    number = _exact(value, kind, field)
    least, most = LIMITS[kind]
    if number > 0 and not least <= number <= most:
        raise ValueError(f"{field} is {shown(value)}; it must be between {least:g} and {most:g} {_BASE[kind]}")
    if kind != "bytes":
        return float(number)
    if number.denominator != 1:
        raise ValueError(f"{field} is {value!r}, which is {float(number):g} bytes; it must be a whole number of bytes")
    return number.numerator


def shown(value: object) -> str:
    """``value`` as errors show it: on one line, shortened where it is long."""
    try:
        text = repr(value).replace("\n", " ")
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or a container inside itself
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def format_quantity(value: float, *, kind: Kind) -> str:
    """``value`` with three digits and a suitable unit, for people: ``8 GB``, ``20 Mbit/s``, ``15 ms``."""
    names = {
        "bytes": ["B", "kB", "MB", "GB", "TB"],
        "bytes_per_s": ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"],
        "flop_per_s": ["FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s"],
        "s": ["ns", "us", "ms", "s"],
        "watts": ["mW", "W", "kW"],
    }[kind]
    factors = [float(UNITS[kind][name]) for name in names]
    chosen = max((i for i, factor in enumerate(factors) if abs(value) >= factor), default=0)
    scaled = value / factors[chosen]
    return f"{scaled:.0f} {names[chosen]}" if abs(scaled) >= 1000 else f"{scaled:.3g} {names[chosen]}"


def _exact(value: object, kind: Kind, field: str) -> Fraction:
    """``value`` as an exact number of base units."""
    allowed = f"a number, or a number with a unit such as {_ALSO[kind]} (units: {', '.join(UNITS[kind])})"
    if (
        isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
    ):  # neither nan nor infinite
        return Fraction(value)
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    factor = UNITS[kind].get(match[2]) if match and match[2] else Fraction(1)
    if match is None or factor is None:
        raise ValueError(f"{field} is {shown(value)}; it must be {allowed}")
    return Fraction(match[1]) * factor
