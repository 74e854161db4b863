import numpy as np
import pytest
from fedbonsai.actors.device.resource_usage import _CLEAR, ResourceUsage, peak_resident_bytes


@pytest.mark.skipif(not _CLEAR.exists(), reason="only Linux lets a process reset its high-water mark")
def test_the_peak_is_that_of_this_stretch_of_work() -> None:
    with ResourceUsage() as before:
        pass
    with ResourceUsage() as busy:
        block = np.ones(64 << 20, np.uint8)
    del block
    with ResourceUsage() as after:
        pass
    assert busy.peak_memory_bytes >= before.peak_memory_bytes + (48 << 20)
    assert after.peak_memory_bytes <= busy.peak_memory_bytes - (48 << 20)


def test_the_figures_stand_after_an_error() -> None:
    usage = ResourceUsage()
    with pytest.raises(RuntimeError), usage:
        raise RuntimeError
    assert usage.wall_s > 0
    assert usage.peak_memory_bytes > 0


def test_the_mark_is_in_bytes() -> None:
    assert 10 << 20 < peak_resident_bytes() < 1 << 40
