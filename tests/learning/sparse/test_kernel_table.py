"""Which kernels are chosen, from seconds written by hand, and by measuring this machine."""

import pytest
import torch
from fedbonsai.learning.models.cnn import digits_cnn
from fedbonsai.learning.sparse.kernel_table import fastest, measure_kernels
from fedbonsai.learning.sparse.kernels import native
from fedbonsai.learning.sparse.kernels.measure import PassSeconds
from fedbonsai.learning.sparse.selection import make_sparse
from fedbonsai.learning.spec import LayerKernels, Sparsity, kernel_key
from torch import nn


def seconds(pack, forward, grad_input, grad_weight):
    return PassSeconds(pack=pack, forward=forward, grad_input=grad_input, grad_weight=grad_weight)


DENSE = seconds(0, 10, 10, 10)


def test_without_another_kernel_all_products_are_dense():
    assert fastest({"dense": DENSE}) == LayerKernels()


def test_packing_is_counted_once_where_both_products_use_it():
    found = fastest({"dense": DENSE, "native": seconds(2, 3, 4, 5)})
    assert found == LayerKernels(kernels=("native", "native", "native"), times=(0.5, 0.4, 0.5))


def test_packing_counts_for_the_only_product_that_uses_it():
    found = fastest({"dense": DENSE, "native": seconds(2, 3, 40, 50)})
    assert found == LayerKernels(kernels=("native", "dense", "dense"), times=(0.5, 1, 1))
    found = fastest({"dense": DENSE, "native": seconds(2, 40, 3, 50)})
    assert found == LayerKernels(kernels=("dense", "native", "dense"), times=(1, 0.5, 1))


def test_output_and_input_gradient_are_chosen_together():
    """By itself neither product gains: 6 to pack and 5 take longer than 10. Both together take 16 instead of 20."""
    found = fastest({"dense": DENSE, "native": seconds(6, 5, 5, 50)})
    assert found == LayerKernels(kernels=("native", "native", "dense"), times=(1.1, 0.5, 1))


def test_packing_that_costs_more_than_it_gains_leaves_both_dense():
    found = fastest({"dense": DENSE, "native": seconds(12, 5, 5, 2)})
    assert found == LayerKernels(kernels=("dense", "dense", "native"), times=(1, 1, 0.2))


def test_one_kernel_packs_for_both_products():
    """A weight is packed in one form: native output and CSR gradient would have to pack twice."""
    found = fastest({"dense": DENSE, "native": seconds(1, 2, 8, 9), "csr": seconds(1, 8, 1, 3)})
    assert found == LayerKernels(kernels=("csr", "csr", "csr"), times=(0.9, 0.1, 0.3))
    found = fastest({"dense": DENSE, "native": seconds(1, 2, 6, 2), "csr": seconds(1, 8, 1, 3)})
    assert found == LayerKernels(kernels=("native", "native", "native"), times=(0.3, 0.6, 0.2))


@pytest.mark.parametrize(
    ("sparse", "kernels", "times"),
    [
        (9.6, ("dense", "dense", "dense"), (1.0, 1.0, 1.0)),
        (9.4, ("native", "native", "native"), (0.94, 0.94, 0.94)),
    ],
)
def test_a_gain_below_a_twentieth_is_none(sparse, kernels, times):
    """10 / 9.6 is 1.04, and 10 / 9.4 is 1.06."""
    found = fastest({"dense": DENSE, "native": seconds(0, sparse, sparse, sparse)})
    assert found == LayerKernels(kernels=kernels, times=times)


def test_under_channels_last_kernels_are_compared_with_dense_ones_of_that_format():
    measured = {"dense": DENSE, "native": seconds(1, 2, 2, 2)}
    measured |= {"dense_channels_last": seconds(0, 4, 4, 8), "native_channels_last": seconds(1, 4, 4, 4)}
    assert fastest(measured).kernels == ("native", "native", "native")
    found = fastest(measured, layout="channels_last")
    assert found == LayerKernels(kernels=("dense", "dense", "native"), times=(1, 1, 0.5))


def test_times_have_three_digits():
    found = fastest({"dense": seconds(0, 3, 3, 3), "native": seconds(0, 1, 1, 2)})
    assert found.times == (0.333, 0.333, 0.667)


# Measured.


def table_of(model, sample, *sparsities, **settings):
    make_sparse(model, sparsities[0])
    return measure_kernels(model, sample, **{"batch": 4, "sparsities": sparsities, "layout": "contiguous"} | settings)


LAYERS = ("features.2", "classifier.0")
IMAGE = torch.zeros(1, 8, 8)


def test_every_layer_has_a_row_at_every_sparsity():
    sparsities, model = (Sparsity(), Sparsity(weights=0.5, activations=0.5)), digits_cnn()
    before = torch.get_rng_state()
    table, missing = table_of(model, IMAGE, *sparsities)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(table) == sorted(kernel_key(layer, sparsity) for layer in LAYERS for sparsity in sparsities)
    assert missing == (native.build() or "")
    for key, row in table.items():
        assert "csr" not in row.kernels or key.startswith("classifier")
        for kernel, time in zip(row.kernels, row.times, strict=True):
            assert time == 1 if kernel == "dense" else time > 0


def test_without_a_compiler_the_table_says_why_and_names_no_native_kernel(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    table, missing = table_of(digits_cnn(), IMAGE, Sparsity())
    assert missing == ("the native kernels need a C++ compiler, and no-such-compiler was not found (CXX names another)")
    assert len(table) == 2
    assert not [row for row in table.values() if "native" in row.kernels]


def test_layers_of_equal_geometry_are_measured_once(monkeypatch):
    measured = []

    def note(layer, **settings):
        measured.append((layer.weight, settings["batch"]))
        return {"dense": DENSE}

    monkeypatch.setattr("fedbonsai.learning.sparse.kernel_table.measure", note)
    twins = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    table, _ = table_of(twins, torch.zeros(6), Sparsity())
    assert sorted(table) == ["1 at 0.9, 0.9", "2 at 0.9, 0.9"]
    assert measured == [((6, 6), 4)]
    measured.clear()
    table_of(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), torch.zeros(5, 6), Sparsity())
    assert measured == [((6, 6), 20)]  # the elements of four sequences


class Unused(nn.Module):
    """The second layer is not called, and the third is grouped: neither is measured."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1, groups=groups) for groups in (1, 1, 2))

    def forward(self, x):
        return self.third(self.first(x))


@pytest.mark.parametrize("share", [0.9, 0.0])
def test_what_no_kernel_can_do_is_dense_and_not_measured(monkeypatch, share):
    monkeypatch.setattr("fedbonsai.learning.sparse.kernel_table.measure", None)
    sparsity = Sparsity(weights=share, activations=share, layers=("second", "third") if share else ())
    table, _ = table_of(Unused(), torch.zeros(4, 6, 6), sparsity)
    assert table == {kernel_key(name, sparsity): LayerKernels() for name in sparsity.layers or ("second",)}


@pytest.mark.parametrize(
    ("weights", "activations", "kernels", "times"),
    [
        (0.9, 0.0, ("native", "native", "dense"), (0.5, 0.4, 1.0)),
        (0.0, 0.9, ("dense", "dense", "native"), (1.0, 1.0, 0.5)),
    ],
)
def test_a_product_of_which_nothing_is_left_out_is_dense(monkeypatch, weights, activations, kernels, times):
    """The zeros behind a ReLU can make a kernel the fastest even so; the multiplier does not use it."""
    sparsity, row = Sparsity(weights=weights, activations=activations), seconds(2, 3, 4, 5)
    monkeypatch.setattr(
        "fedbonsai.learning.sparse.kernel_table.measure", lambda *_, **__: {"dense": DENSE, "native": row}
    )
    table, _ = table_of(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), torch.zeros(6), sparsity)
    assert table == {kernel_key("1", sparsity): LayerKernels(kernels=kernels, times=times)}
