import numpy as np
import pytest
from fedbonsai.comms.channel import LocalChannel


def test_a_reference_may_be_read_several_times() -> None:
    channel, packet = LocalChannel(), np.arange(8, dtype=np.uint8)
    reference = channel.put(packet)
    first, second = channel.get(reference), channel.get(reference)
    assert first.tolist() == list(range(8))
    assert np.shares_memory(first, second)


def test_stored_packets_are_read_only() -> None:
    channel = LocalChannel()
    packet = channel.get(channel.put(np.zeros(8, np.uint8)))
    with pytest.raises(ValueError, match="read-only"):
        packet[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        packet.view("<f4")[0] = 1
