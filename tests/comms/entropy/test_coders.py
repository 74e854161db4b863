"""Frequency tables, sections of symbols, and the two entropy coders, with small numbers."""

import numpy as np
import pytest
from fedbonsai.comms.entropy import tables
from fedbonsai.comms.entropy.coders import SymbolReader, SymbolWriter, constriction_runs
from fedbonsai.comms.entropy.rans import RansDecoder
from fedbonsai.comms.errors import CorruptPacket, TruncatedPacket
from hypothesis import given
from hypothesis import strategies as st

CODERS = ["ans", "rans"] if constriction_runs() else ["rans"]
coders = pytest.mark.parametrize("coder", CODERS)


def test_frequencies_sum_to_the_total_and_none_is_lost():
    table = tables.normalise([0, 1, 10**9, 1])
    assert table.tolist() == [0, 1, tables.TOTAL - 2, 1]


def test_levels_are_exact_for_small_counts_and_near_for_large_ones():
    counts = np.array([*range(17), 1000, 2**30 + 12345, 2**48 - 1])
    found = tables.count_of(tables.level_of(counts))
    assert found[:17].tolist() == list(range(17))
    assert (np.abs(found - counts) <= counts / 8).all()
    assert tables.level_of(counts).max() < tables.LEVELS


def test_folding_orders_numbers_by_size():
    assert tables.fold(np.array([0, -1, 1, -2, 2])).tolist() == [0, 1, 2, 3, 4]
    assert tables.unfold(np.arange(5)).tolist() == [0, -1, 1, -2, 2]


def test_powers_and_geometric_tables_by_hand():
    half = 1 << 29
    assert tables.power(4, 2, 1) == half
    assert tables.power(4, 2, 3) == half >> 2
    assert tables.halves(4, 2) == 0  # one step is rare enough
    assert tables.halves(1000, 10) == 6  # 0.99^64 = 0.526 is the first below 5/8
    assert tables.geometric(half, 3).tolist() == [9362, 4681, 2341]


@coders
@given(seed=st.integers(0, 2**32 - 1), sections=st.lists(st.integers(0, 3000), max_size=4))
def test_sections_are_read_in_the_order_of_writing(coder, seed, sections):
    generator = np.random.default_rng(seed)
    writer, sent = SymbolWriter(coder), []
    for count in sections:
        table = tables.normalise(generator.integers(0, 50, generator.integers(1, 40)) + np.array([1]))
        bits = int(generator.integers(0, 20))
        pieces = ((generator.integers(0, len(table), count), table), (generator.integers(0, 1 << bits, count), bits))
        writer.put(*pieces)
        sent.append(pieces)
    reader = SymbolReader(writer.finish())
    for pieces in sent:
        found = reader.take(*((len(symbols), table) for symbols, table in pieces))
        for (symbols, _), got in zip(pieces, found, strict=True):
            assert symbols.tolist() == got.tolist()
    reader.finish()


@coders
def test_a_stream_that_goes_on_is_corrupt(coder):
    writer = SymbolWriter(coder)
    writer.put((np.arange(100) % 3, tables.normalise([1, 1, 1])))
    stream = writer.finish()
    for reader in (SymbolReader(stream), SymbolReader(np.concatenate([stream, np.array([1, 1], np.uint8)]))):
        reader.take((50, tables.normalise([1, 1, 1])))
        with pytest.raises(CorruptPacket, match="does not end"):
            reader.finish()


def test_raw_bits_that_are_missing_or_left_over_are_found():
    writer = SymbolWriter("rans")
    writer.put((np.arange(8), 3))
    stream = writer.finish()
    with pytest.raises(TruncatedPacket, match="fewer raw bits"):
        SymbolReader(stream).take((9, 3))
    with pytest.raises(CorruptPacket, match="more raw bits"):
        SymbolReader(stream).finish()


def test_a_decoder_that_does_not_end_in_the_initial_state_is_corrupt():
    initial = RansDecoder(np.array([1, 0, 0, 0, 0, 1, 0], np.uint8))  # one lane, at 2^24
    initial.finish()
    with pytest.raises(CorruptPacket, match="does not end where its symbols do"):
        RansDecoder(np.array([1, 0, 1, 0, 0, 1, 0], np.uint8)).finish()


def test_fewer_lanes_than_an_encoder_has_for_so_many_symbols_are_corrupt():
    table = tables.normalise([1, 1])
    two_lanes = np.array([2, 0, *[0, 0, 0, 1, 0] * 2], np.uint8)
    one_lane = np.array([1, 0, 0, 0, 0, 1, 0, *[0] * 2000], np.uint8)
    RansDecoder(one_lane).take([(2047, table)])
    with pytest.raises(CorruptPacket, match="of 2048 symbols or more has 1 lanes, where 2 are expected"):
        RansDecoder(one_lane).take([(2048, table)])
    decoder = RansDecoder(one_lane)  # the symbols of all sections count
    decoder.take([(1024, table)])
    with pytest.raises(CorruptPacket, match="of 2048 symbols"):
        decoder.take([(1000, table), (24, table)])
    with pytest.raises(TruncatedPacket):
        RansDecoder(two_lanes).take([(2048, table)])


@pytest.mark.skipif("ans" not in CODERS, reason="constriction is not installed")
@pytest.mark.parametrize("words", [[1, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0]])
def test_words_that_end_in_a_zero_byte_are_corrupt(words):
    from fedbonsai.comms.entropy.ans import AnsDecoder

    with pytest.raises(CorruptPacket, match="ends in a zero byte"):
        AnsDecoder(np.array(words, np.uint8))
