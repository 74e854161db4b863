import numpy as np
import pytest
from fedbonsai.comms.channel import LocalChannel


def test_a_reference_gives_back_the_packet_to_as_many_as_ask() -> None:
    channel, packet = LocalChannel(), np.arange(8, dtype=np.uint8)
    reference = channel.put(packet)
    first, second = channel.get(reference), channel.get(reference)
    assert first.tolist() == list(range(8))
    assert np.shares_memory(first, second)


def test_nobody_can_change_what_others_read() -> None:
    channel = LocalChannel()
    packet = channel.get(channel.put(np.zeros(8, np.uint8)))
    with pytest.raises(ValueError, match="read-only"):
        packet[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        packet.view("<f4")[0] = 1
