"""Seeds: every random number of a run comes from one seed and a path of names and numbers, never from a shared generator."""

import hashlib
from typing import SupportsInt


def derive(seed: int, *path: str | SupportsInt) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(run_seed, "plan", device, version)``.

    Hashing the path keeps purposes apart: the seed of a device's third round does not depend on how many devices there
    are or in which order they were asked. Numbers count by value, whether Python's or numpy's.
    """
    text = "/".join(f"str:{step}" if isinstance(step, str) else f"int:{int(step)}" for step in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
