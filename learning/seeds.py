"""Seeds: every random number of a run derives from one seed and a path of names and numbers, not from a shared generator."""

import hashlib
from typing import SupportsInt


def derive(seed: int, *path: str | SupportsInt) -> int:
    """Derive a 63-bit seed for one purpose, e.g. ``derive(run_seed, "plan", device, version)``.

    Hashing the path makes seeds independent: the seed of a device's third round depends neither on the number of devices nor on
    the order of calls. Python's and numpy's numbers of equal value give the same seed.
    """
    text = "/".join(f"str:{step}" if isinstance(step, str) else f"int:{int(step)}" for step in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
