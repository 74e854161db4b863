"""A receiver of mutated packets raises a ``PacketError`` or returns arrays of the expected shapes, within a limit of memory.

Warnings are errors here, so there are none either. benchmarks/soak_packets.py does the same with a million packets.
"""

import tracemalloc

import pytest
from fedbonsai.comms.errors import PacketError
from hypothesis import given, settings
from hypothesis import strategies as st

from .mutations import MUTATIONS, mutated, put_together, taken_apart
from .receivers import LARGE, PEAK_BYTES, Case, cases, fault_of, large, stated_bytes

CASES = cases()
LARGE_CASE = large()


def read(case: Case, packet: object) -> tuple[str, int]:
    """The fault of a receiver with this packet ("" for none), and its peak of memory."""
    tracemalloc.start()
    try:
        fault = fault_of(case, case.read(packet))
    except PacketError:
        fault = ""
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return fault, peak


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_valid_packets_are_read_and_can_be_taken_apart(case: Case) -> None:
    for packet in case.packets:
        assert fault_of(case, case.read(packet)) == ""
        assert put_together(*taken_apart(packet, case.layout), case.layout).tobytes() == packet.tobytes()


@pytest.mark.parametrize("mutation", MUTATIONS)
@given(name=st.sampled_from(list(CASES)), seed=st.integers(0, 2**32 - 1))
def test_mutated_packets(mutation: str, name: str, seed: int) -> None:
    case = CASES[name]
    fault, peak = read(case, mutated(case, (seed,), (mutation,)))
    assert fault == ""
    assert peak < PEAK_BYTES


@pytest.mark.parametrize("mutation", ["flip_bits", "contents", "noise", "tamper"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_mutated_packets_of_many_weights_of_which_few_are_nonzero(mutation: str, seed: int) -> None:
    fault, peak = read(LARGE_CASE, mutated(LARGE_CASE, (seed,), (mutation,)))
    assert fault == ""
    assert peak < stated_bytes([LARGE])


def test_mutations_are_reproducible_and_reach_every_outcome() -> None:
    """Otherwise the properties above would mean little."""
    outcomes, accepted = set(), set()
    for seed in range(60):
        for mutation in MUTATIONS:
            case = CASES[list(CASES)[(seed * 7) % len(CASES)]]
            packet = mutated(case, (seed,), (mutation,))
            assert packet.tobytes() == mutated(case, (seed,), (mutation,)).tobytes()
            try:
                case.read(packet)
            except PacketError as error:
                outcomes.add(type(error))
            else:
                if all(packet.tobytes() != valid.tobytes() for valid in case.packets):
                    accepted.add(mutation)
    assert outcomes == set(PacketError.__subclasses__())
    # Values that fit are accepted: another device might have sent them.
    assert {"contents", "tamper"} <= accepted
    assert not {"truncate", "extend"} & accepted
