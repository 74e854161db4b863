import numpy as np
import torch
from fedbonsai.learning.tensors import as_arrays, as_tensors, numpy_name


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
