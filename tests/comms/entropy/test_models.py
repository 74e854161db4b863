"""Alphabets, density classes, gaps, positions and signs, with small numbers."""

import numpy as np
import pytest
from fedbonsai.comms.entropy import density, gaps, positions, signs, tables
from fedbonsai.comms.entropy.alphabets import Alphabet, fit, pieces_of, requests_of, values_of
from fedbonsai.comms.entropy.coders import SymbolReader, SymbolWriter
from fedbonsai.comms.errors import CorruptPacket

from .test_coders import coders


def test_an_alphabet_holds_the_values_that_occur_and_keeps_low_bits_raw():
    few, _ = fit(np.bincount([7] * 12 + [9] * 4, minlength=256) * 50)
    assert (few.first, few.low_bits, tables.count_of(few.levels).tolist()) == (7, 0, [576, 0, 192])
    noise, bits = fit(np.full(256, 4))
    assert noise.low_bits >= 4
    assert bits < 1.02 * 8 * 1024


@coders
def test_values_above_a_byte_are_corrupt(coder):
    writer = SymbolWriter(coder)
    alphabet = Alphabet(200, 5, np.array([1, 1]))  # 200..231 and 232..263
    writer.put((np.array([1]), alphabet.table), (np.array([31]), 5))
    reader = SymbolReader(writer.finish())
    with pytest.raises(CorruptPacket, match="above 255"):
        values_of(reader.take(*requests_of(1, alphabet)), alphabet)
    assert len(pieces_of(np.array([200], np.uint8), alphabet)) == 2


@coders
def test_gaps_of_any_length_come_back(coder):
    sizes, lengths = np.array([1 << 40, 4, 10]), np.array([2, 4, 0])
    gaps_sent = np.array([(1 << 39) + 5, 0, 0, 0, 0, 0])
    writer = SymbolWriter(coder)
    gaps.put_counts(writer, lengths)
    gaps.put_gaps(writer, gaps_sent, lengths, sizes)
    reader = SymbolReader(writer.finish())
    counts = gaps.take_counts(reader, sizes)
    assert counts.tolist() == lengths.tolist()
    assert gaps.take_gaps(reader, counts, sizes).tolist() == gaps_sent.tolist()
    reader.finish()


def test_counts_above_their_class_are_corrupt():
    writer = SymbolWriter("rans")
    gaps.put_counts(writer, np.array([5]))
    with pytest.raises(CorruptPacket, match="a class has more nonzero entries than entries"):
        gaps.take_counts(SymbolReader(writer.finish()), np.array([4]))


def test_a_gap_beyond_the_end_of_its_class_is_corrupt():
    # One of ten: 0.9^8 is the first power of a power of two below 5/8, so a gap is 8 * quotient + rest, the quotient 0 or 1.
    for gap, refused in ((15, False), (16, True)):
        writer = SymbolWriter("rans")
        gaps.put_gaps(writer, np.array([gap]), np.array([1]), np.array([10]))
        reader = SymbolReader(writer.finish())
        if not refused:
            assert gaps.take_gaps(reader, np.array([1]), np.array([10])).tolist() == [15]
            continue
        with pytest.raises(CorruptPacket, match="a gap beyond the end of its class"):
            gaps.take_gaps(reader, np.array([1]), np.array([10]))


def test_positions_beyond_their_class_or_too_many_are_corrupt():
    views = [positions.classed_shape(density.DensityClasses((1, 10, 1), 5))]
    writer = SymbolWriter("rans")
    positions.put_positions(writer, [np.array([2, 3, 9])], views)
    stream = writer.finish()
    assert positions.take_positions(SymbolReader(stream), views, 3)[0].tolist() == [2, 3, 9]
    with pytest.raises(CorruptPacket, match="has 3 nonzero entries, where at most 2 are expected"):
        positions.take_positions(SymbolReader(stream), views, 2)
    writer = SymbolWriter("rans")
    gaps.put_counts(writer, np.array([1]))
    gaps.put_gaps(writer, np.array([10]), np.array([1]), np.array([10]))  # places are 0 to 9
    with pytest.raises(CorruptPacket, match="beyond the end of its class"):
        positions.take_positions(SymbolReader(writer.finish()), views, 3)


def test_blocks_of_equal_density_of_two_tensors_are_adjacent():
    first = density.DensityClasses((2, 2, 1), 5, [np.array([0, 1]), None, None])
    second = density.DensityClasses((1, 3, 1), 6)
    blocks = positions.blocks_of([positions.classed_shape(first), positions.classed_shape(second)])
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
    writer = SymbolWriter(coder)
    signs.put_models(writer, [model])
    writer.put(*signs.pieces_of(negative, flat, shape, model))
    reader = SymbolReader(writer.finish())
    (found,) = signs.take_models(reader, [mode], [flat], [shape])
    assert found.rows.tolist() == model.rows.tolist()
    parts = reader.take(*signs.requests_of(flat, shape, found))
    assert signs.signs_of(parts, flat, shape, found).tolist() == negative.tolist()
    reader.finish()


def test_the_sign_model_follows_the_data():
    shape, flat = (4, 5, 9), np.arange(180)
    by_row = np.repeat([0, 1, 0, 1], 45)
    assert signs.fit(by_row, flat, shape)[0].mode & signs.BY_ROW
    by_kernel = np.repeat(np.random.default_rng(0).integers(0, 2, 20), 9)
    assert signs.fit(by_kernel, flat, shape)[0].mode & signs.BY_KERNEL
    assert signs.fit(np.zeros(180, np.int64), flat, shape)[0][:2] == (0, 0)
