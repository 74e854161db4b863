"""Seeds: every random number of a run comes from one seed and a path of names and numbers, never from a shared generator."""

import hashlib


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(run_seed, "plan", device, version)``.

    Hashing the path keeps purposes apart: the seed of a device's third round does not depend on how many devices there
    are or in which order they were asked.
    """
    text = "/".join(f"{type(step).__name__}:{step}" for step in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
