import itertools

import numpy as np
import pytest
import torch
from fedbonsai.learning.tensors import as_arrays, as_tensors, axis_order, in_axis_order, numpy_name


def test_both_ways_share_memory() -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    tensor = as_tensors({"w": array})["w"]
    array[0, 0] = 9
    assert tensor.tolist() == [[9, 1, 2], [3, 4, 5]]
    again = as_arrays({"w": tensor.requires_grad_()})["w"]
    assert np.shares_memory(again, array)


def test_read_only_arrays_and_numbers_are_welcome() -> None:
    packet = np.frombuffer(np.arange(2, dtype="<f4").tobytes(), "<f4")
    assert not packet.flags.writeable
    found = as_tensors({"w": packet, "number": np.array(3, "<i8"), "none": np.zeros((0, 2), "<f2")})
    assert found["w"].tolist() == [0, 1]
    assert found["number"].item() == 3
    assert found["none"].shape == (0, 2)


def test_names_of_types() -> None:
    types = {torch.float32: "<f4", torch.float16: "<f2", torch.int64: "<i8", torch.bool: "|b1", torch.uint8: "|u1"}
    assert {dtype: numpy_name(dtype) for dtype in types} == types


def test_the_formats_that_torch_names_have_their_numbers():
    image = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    # Orders of four axes, in lexicographic order: NCHW 0, NCWH 1, NHCW 2, NHWC 3.
    assert axis_order(image) == 0
    assert axis_order(image.contiguous(memory_format=torch.channels_last)) == 3
    assert axis_order(torch.zeros(3, 2).t()) == 1
    assert axis_order(torch.tensor(1.0)) == axis_order(torch.zeros(5)) == axis_order(torch.zeros(0, 3)) == 0


@pytest.mark.parametrize(
    "shape", [(), (4,), (2, 3), (2, 1, 3), (2, 3, 4, 5), (8, 64, 1, 1), (1, 3, 2, 2), (2, 1, 2, 1, 3)]
)
def test_every_dense_format_comes_back_stride_by_stride(shape):
    values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    for order in itertools.permutations(range(len(shape))):
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        dense = values.permute(order).contiguous().permute(inverse)
        made = in_axis_order(values, axis_order(dense))
        assert torch.equal(made, values)
        assert made.data_ptr() != values.data_ptr() or not values.numel()
        # The stride of an axis of length 1 has no meaning; the others select the kernels.
        assert [s for s, n in zip(made.stride(), shape, strict=True) if n > 1] == [
            s for s, n in zip(dense.stride(), shape, strict=True) if n > 1
        ]


def test_pictures_of_one_pixel_keep_the_format_that_torch_reads_from_their_strides():
    pixels = torch.randn(8, 64, 1, 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        # (.contiguous() returns such a tensor unchanged, since it is in both formats; an operation's result is not.)
        laid_out = torch.empty(8, 64, 1, 1, memory_format=memory_format).copy_(pixels)
        assert in_axis_order(pixels, axis_order(laid_out)).stride() == laid_out.stride()


def test_numbers_that_are_no_format_are_refused():
    for rank in (-1, 24, 2**32 - 1):
        with pytest.raises(ValueError, match=f"memory format {rank} does not exist for a tensor with 4 axes"):
            in_axis_order(torch.zeros(1, 2, 3, 4), rank)


def test_more_axes_than_numbers_are_row_major():
    many = torch.zeros((1,) * 13)
    assert axis_order(many.transpose(0, 12)) == 0
    assert in_axis_order(many, 0).shape == many.shape
