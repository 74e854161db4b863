"""The parts of the entropy codec, with numbers small enough for a pencil."""

import numpy as np
import pytest
from fedbonsai.comms.entropy import density, gaps, positions, signs, tables
from fedbonsai.comms.entropy.alphabets import Alphabet, fit, pieces_of, values_of, wants_of
from fedbonsai.comms.entropy.coders import StageReader, StageWriter, constriction_runs
from fedbonsai.comms.entropy.rans import RansDecoder
from fedbonsai.comms.errors import CorruptPacket, TruncatedPacket
from hypothesis import given, settings
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


def test_powers_and_tables_of_gaps_are_integers_alike_everywhere():
    half = 1 << 29
    assert tables.power(4, 2, 1) == half
    assert tables.power(4, 2, 3) == half >> 2
    assert tables.halves(4, 2) == 0  # one step is rare enough
    assert tables.halves(1000, 10) == 6  # 0.99^64 = 0.526 is the first below 5/8
    assert tables.geometric(half, 3).tolist() == [9362, 4681, 2341]


def test_an_alphabet_holds_what_occurs_and_keeps_low_bits_raw():
    few, _ = fit(np.bincount([7] * 12 + [9] * 4, minlength=256) * 50)
    assert (few.first, few.low_bits, tables.count_of(few.levels).tolist()) == (7, 0, [576, 0, 192])
    noise, bits = fit(np.full(256, 4))
    assert noise.low_bits >= 4
    assert bits < 1.02 * 8 * 1024


@coders
def test_values_above_a_byte_are_corrupt(coder):
    writer = StageWriter(coder)
    alphabet = Alphabet(200, 5, np.array([1, 1]))  # 200..231 and 232..263
    writer.put((np.array([1]), alphabet.table), (np.array([31]), 5))
    reader = StageReader(writer.finish())
    with pytest.raises(CorruptPacket, match="above 255"):
        values_of(reader.take(*wants_of(1, alphabet)), alphabet)
    assert len(pieces_of(np.array([200], np.uint8), alphabet)) == 2


@coders
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stages=st.lists(st.integers(0, 3000), max_size=4))
def test_stages_come_back_in_order(coder, seed, stages):
    generator = np.random.default_rng(seed)
    writer, sent = StageWriter(coder), []
    for count in stages:
        table = tables.normalise(generator.integers(0, 50, generator.integers(1, 40)) + np.array([1]))
        bits = int(generator.integers(0, 20))
        pieces = ((generator.integers(0, len(table), count), table), (generator.integers(0, 1 << bits, count), bits))
        writer.put(*pieces)
        sent.append(pieces)
    reader = StageReader(writer.finish())
    for pieces in sent:
        found = reader.take(*((len(symbols), table) for symbols, table in pieces))
        for (symbols, _), got in zip(pieces, found, strict=True):
            assert symbols.tolist() == got.tolist()
    reader.finish()


@coders
def test_a_stream_that_goes_on_is_corrupt(coder):
    writer = StageWriter(coder)
    writer.put((np.arange(100) % 3, tables.normalise([1, 1, 1])))
    stream = writer.finish()
    for reader in (StageReader(stream), StageReader(np.concatenate([stream, np.array([1, 1], np.uint8)]))):
        reader.take((50, tables.normalise([1, 1, 1])))
        with pytest.raises(CorruptPacket, match="does not end"):
            reader.finish()


def test_raw_bits_that_are_missing_or_left_over_are_found():
    writer = StageWriter("rans")
    writer.put((np.arange(8), 3))
    stream = writer.finish()
    with pytest.raises(TruncatedPacket, match="fewer raw bits"):
        StageReader(stream).take((9, 3))
    with pytest.raises(CorruptPacket, match="more raw bits"):
        StageReader(stream).finish()


@coders
def test_gaps_of_any_length_come_back(coder):
    sizes, lengths = np.array([1 << 40, 4, 10]), np.array([2, 4, 0])
    gaps_sent = np.array([(1 << 39) + 5, 0, 0, 0, 0, 0])
    writer = StageWriter(coder)
    gaps.put_counts(writer, lengths)
    gaps.put_gaps(writer, gaps_sent, lengths, sizes)
    reader = StageReader(writer.finish())
    counts = gaps.take_counts(reader, sizes)
    assert counts.tolist() == lengths.tolist()
    assert gaps.take_gaps(reader, counts, sizes).tolist() == gaps_sent.tolist()
    reader.finish()


def test_counts_above_their_class_are_corrupt():
    writer = StageWriter("rans")
    gaps.put_counts(writer, np.array([5]))
    with pytest.raises(CorruptPacket, match="more entries are there than a class has"):
        gaps.take_counts(StageReader(writer.finish()), np.array([4]))


def test_a_gap_beyond_the_end_of_its_class_is_corrupt():
    # One of ten: 0.9^8 is the first power of a power of two below 5/8, so a gap is 8 * quotient + rest, the quotient 0 or 1.
    for gap, refused in ((15, False), (16, True)):
        writer = StageWriter("rans")
        gaps.put_gaps(writer, np.array([gap]), np.array([1]), np.array([10]))
        reader = StageReader(writer.finish())
        if not refused:
            assert gaps.take_gaps(reader, np.array([1]), np.array([10])).tolist() == [15]
            continue
        with pytest.raises(CorruptPacket, match="a gap beyond the end of its class"):
            gaps.take_gaps(reader, np.array([1]), np.array([10]))


def test_positions_beyond_their_class_or_more_than_there_may_be_are_corrupt():
    views = [positions.view_of(density.Classes((1, 10, 1), 5))]
    writer = StageWriter("rans")
    positions.put_positions(writer, [np.array([2, 3, 9])], views)
    stream = writer.finish()
    assert positions.take_positions(StageReader(stream), views, 3)[0].tolist() == [2, 3, 9]
    with pytest.raises(CorruptPacket, match="says that 3 entries are there, where 2 may be"):
        positions.take_positions(StageReader(stream), views, 2)
    writer = StageWriter("rans")
    gaps.put_counts(writer, np.array([1]))
    gaps.put_gaps(writer, np.array([10]), np.array([1]), np.array([10]))  # places are 0 to 9
    with pytest.raises(CorruptPacket, match="beyond the end of its class"):
        positions.take_positions(StageReader(writer.finish()), views, 3)


def test_a_coder_that_does_not_end_where_it_began_is_corrupt():
    began = RansDecoder(np.array([1, 0, 0, 0, 0, 1, 0], np.uint8))  # one lane, at 2^24
    began.finish()
    with pytest.raises(CorruptPacket, match="does not end where its symbols do"):
        RansDecoder(np.array([1, 0, 1, 0, 0, 1, 0], np.uint8)).finish()


def test_fewer_lanes_than_an_encoder_has_for_so_many_symbols_are_corrupt():
    table = tables.normalise([1, 1])
    two_lanes = np.array([2, 0, *[0, 0, 0, 1, 0] * 2], np.uint8)
    one_lane = np.array([1, 0, 0, 0, 0, 1, 0, *[0] * 2000], np.uint8)
    RansDecoder(one_lane).take([(2047, table)])
    with pytest.raises(CorruptPacket, match="of 2048 symbols or more has 1 lanes, where 2 are expected"):
        RansDecoder(one_lane).take([(2048, table)])
    decoder = RansDecoder(one_lane)  # all stages together
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


def test_blocks_put_alike_densities_of_two_tensors_side_by_side():
    first = density.Classes((2, 2, 1), 5, [np.array([0, 1]), None, None])
    second = density.Classes((1, 3, 1), 6)
    blocks = positions.blocks_of([positions.view_of(first), positions.view_of(second)])
    assert blocks.density.tolist() == [5, 6, 6]  # the first's dense row; its thin row and all of the second
    assert blocks.starts.tolist() == [0, 2, 4, 7]
    assert blocks.tensor.tolist() == [0, 0, 1]


def test_dense_rows_and_columns_get_classes_and_even_ones_do_not():
    generator = np.random.default_rng(0)
    rows = np.repeat([0.5, 0.01], 32)
    uneven = np.flatnonzero(generator.random((64, 50, 9)) < rows[:, None, None])
    classes, bits, _ = density.fit(uneven, (64, 50, 3, 3))
    assert classes.axes[1] is None
    assert classes.of(0)[:32].max() < classes.of(0)[32:].min()
    even = np.flatnonzero(generator.random((64, 50, 9)) < 0.25)
    classes, even_bits, _ = density.fit(even, (64, 50, 3, 3))
    assert classes.axes == [None, None, None]
    assert bits < even_bits


@coders
@pytest.mark.parametrize("mode", range(signs.MODES))
def test_signs_come_back_in_every_mode(coder, mode):
    generator = np.random.default_rng(mode)
    shape, flat = (4, 5, 9), np.flatnonzero(generator.random(180) < 0.4)
    negative = generator.integers(0, 2, len(flat))
    num_rows = len(np.unique(flat // 45)) if mode & signs.BY_ROW else 0
    share = 30 if not mode & signs.BY_ROW else 0
    changed = 20 if mode & signs.BY_KERNEL else 0
    model = signs.SignModel(mode, share, changed, generator.integers(0, 7, num_rows))
    writer = StageWriter(coder)
    signs.put_models(writer, [model])
    writer.put(*signs.pieces_of(negative, flat, shape, model))
    reader = StageReader(writer.finish())
    (found,) = signs.take_models(reader, [mode], [flat], [shape])
    assert found.rows.tolist() == model.rows.tolist()
    parts = reader.take(*signs.wants_of(flat, shape, found))
    assert signs.signs_of(parts, flat, shape, found).tolist() == negative.tolist()
    reader.finish()


def test_the_sign_model_follows_the_data():
    shape, flat = (4, 5, 9), np.arange(180)
    by_row = np.repeat([0, 1, 0, 1], 45)
    assert signs.fit(by_row, flat, shape)[0].mode & signs.BY_ROW
    by_kernel = np.repeat(np.random.default_rng(0).integers(0, 2, 20), 9)
    assert signs.fit(by_kernel, flat, shape)[0].mode & signs.BY_KERNEL
    assert signs.fit(np.zeros(180, np.int64), flat, shape)[0][:2] == (0, 0)
