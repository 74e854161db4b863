import msgspec
import pytest
import torch
from fedbonsai.learning.sparse.kernels import native
from fedbonsai.learning.sparse.kernels.measure import Geometry, PassSeconds, geometry, measure
from torch import nn

SPARSITY = {"weight_sparsity": 0.9, "activation_sparsity": 0.9}


def test_a_layer_and_its_input_have_a_geometry() -> None:
    conv = geometry(nn.Conv2d(3, 8, (5, 3), stride=2, padding=(2, 1)), (3, 10, 10))
    assert conv == Geometry((8, 3, 5, 3), (3, 10, 10), (2, 2), (2, 1))
    assert geometry(nn.Linear(4, 2), (4,)) == Geometry((2, 4), (4,))
    with pytest.raises(ValueError, match=r"^padding 'same': numbers are allowed$"):
        geometry(nn.Conv2d(3, 8, 3, padding="same"), (3, 10, 10))


@pytest.mark.parametrize(
    ("layer", "kernels", "formats"),
    [
        (Geometry((8, 4, 3, 3), (4, 6, 6), (2, 2), (1, 1)), {"dense", "native"}, ["", "_channels_last"]),
        (Geometry((8, 4), (4,)), {"dense", "native", "csr"}, [""]),
    ],
    ids=["convolution", "linear"],
)
@pytest.mark.parametrize("has_native", [False, True])
def test_every_kernel_has_a_time_for_every_pass(layer, kernels, formats, has_native, request) -> None:
    if has_native:
        request.getfixturevalue("native_library")
    before = torch.get_rng_state()
    found = measure(layer, batch=3, native=has_native, **SPARSITY)
    assert torch.equal(torch.get_rng_state(), before)
    expected = kernels if has_native else kernels - {"native"}
    assert set(found) == {kernel + layout for kernel in expected for layout in formats}
    for kernel, seconds in found.items():
        assert 0 < seconds.forward < 1
        assert 0 < seconds.grad_input < 1
        assert 0 < seconds.grad_weight < 1
        assert (seconds.pack > 0) is (not kernel.startswith("dense"))
        assert seconds.step == seconds.pack + seconds.forward + seconds.grad_input + seconds.grad_weight
    assert msgspec.json.decode(msgspec.json.encode(found), type=dict[str, PassSeconds]) == found


def test_a_layer_whose_activations_are_all_zero_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "relu_", torch.Tensor.zero_)
    assert measure(Geometry((8, 4), (4,)), batch=3, native=native.load() is None, **SPARSITY)["dense"].forward > 0
