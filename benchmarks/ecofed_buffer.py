"""Memory of a full replay buffer: memory of 100 devices' views, over the bytes of their activations.

500 samples for each device in packets of ten, plain 8 bit codes behind VGG11's second block (128x8x8): 409.6 MB.
"""

import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from fedbonsai.actors.replay.buffer import ReplayBuffer
from fedbonsai.actors.replay.upload import ViewKey

DEVICES, PACKETS, BATCH, ITEMS = 100, 50, 10, 8192
HEADER_AND_LABELS = 64 + BATCH


def resident_bytes() -> int:
    """Memory that this process uses now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill() -> float:
    """In a new process: growth of its memory, over the bytes of all activations."""
    drawn = np.random.default_rng(0)
    before = resident_bytes()
    buffer = ReplayBuffer(memory_bytes=10**9)
    for device in range(DEVICES):
        key = ViewKey(trunk="trunk", index_map="", cut="features.4", device=device, view="1")
        buffer.begin(key)
        for number in range(PACKETS):
            buffer.add(key, number, drawn.integers(0, 256, BATCH * ITEMS + HEADER_AND_LABELS, np.uint8))
        buffer.commit(key, PACKETS)
    assert len(buffer) == DEVICES
    return (resident_bytes() - before) / (DEVICES * PACKETS * BATCH * ITEMS)


def memory_over_payload() -> float:
    """Growth of a process that holds 100 views, over the bytes of their activations."""
    with get_context("spawn").Pool(1) as pool:
        return round(pool.apply(fill), 4)
