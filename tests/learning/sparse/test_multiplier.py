"""Products by the kernels that a table names: each equals the dense one, and what no kernel can do is dense."""

import pytest
import torch
from fedbonsai.learning.sparse.kernels import convolution, csr, linear, native
from fedbonsai.learning.sparse.multiplier import KernelMultiplier
from fedbonsai.learning.sparse.products import DENSE, Convolution, Product, multiply
from fedbonsai.learning.sparse.thresholds import threshold
from fedbonsai.learning.spec import LayerKernels

ALL = {name: LayerKernels(kernels=(name,) * 3) for name in ("native", "csr")}
# Weight, input, and arguments of a convolution.
SHAPES = {
    "3x3": ((8, 4, 3, 3), (3, 4, 6, 6), Convolution((1, 1), (1, 1), (1, 1), 1)),
    "stride 2": ((8, 4, 5, 3), (3, 4, 7, 9), Convolution((2, 2), (2, 1), (1, 1), 1)),
    "linear": ((6, 12), (5, 12), None),
    "sequence": ((6, 12), (3, 4, 12), None),
    "vector": ((6, 12), (12,), None),
}


def case(shape, multiplier, *, weights=0.75, activations=0.5):
    """Weight, bias, input, and how to multiply; ``weights`` or ``activations`` 0: no threshold."""
    weight_shape, input_shape, at = SHAPES[shape]
    drawn = torch.Generator().manual_seed(2)
    weight, x = torch.randn(weight_shape, generator=drawn), torch.randn(input_shape, generator=drawn)
    bias = torch.randn(weight_shape[0], generator=drawn)
    of_weight = threshold(weight, weights) if weights else None
    product = Product(of_weight, lambda x: threshold(x, activations) if activations else None, at, multiplier)
    return weight, bias, x, product


def products(shape, multiplier, **sparsity):
    """Output, and the gradients of input, weight and bias, for a random gradient of the output."""
    weight, bias, x, product = case(shape, multiplier, **sparsity)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    output = multiply(x, weight, bias, product)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(5)))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_dense(shape, multiplier, **sparsity):
    for found, wanted in zip(products(shape, multiplier, **sparsity), products(shape, DENSE, **sparsity), strict=True):
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("shape", SHAPES)
def test_native_products_equal_the_dense_ones(shape):
    assert_as_dense(shape, KernelMultiplier(ALL["native"]))


@pytest.mark.parametrize("shape", ["linear", "sequence", "vector"])
def test_csr_products_equal_the_dense_ones(shape):
    assert_as_dense(shape, KernelMultiplier(ALL["csr"]))


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(
    "kernels",
    [
        ("native", "dense", "dense"),
        ("dense", "native", "dense"),
        ("dense", "dense", "native"),
        ("csr", "native", "dense"),
        ("native", "csr", "csr"),
    ],
    ids="-".join,
)
def test_each_product_has_the_kernel_of_its_own(kernels):
    assert_as_dense("linear", KernelMultiplier(LayerKernels(kernels=kernels)))
    if "csr" not in kernels:
        assert_as_dense("3x3", KernelMultiplier(LayerKernels(kernels=kernels)))


@pytest.fixture(name="calls")
def calls_fixture(monkeypatch):
    """The names of the kernels that are called, in order."""
    calls = []

    def counted(module, name):
        kernel = getattr(module, name)

        def call(*arguments):
            calls.append(name)
            return kernel(*arguments)

        monkeypatch.setattr(module, name, call)

    for name in ("pack_rows", "linear_forward", "linear_grad_input", "linear_grad_weight"):
        counted(csr, name)
        counted(linear, name)
    for name in ("pack_filters", "conv_forward", "conv_grad_input", "conv_grad_weight"):
        counted(convolution, name)
    return calls


def test_the_weight_is_packed_once_for_output_and_input_gradient(calls):
    products("linear", KernelMultiplier(ALL["csr"]))
    assert calls == ["pack_rows", "linear_forward", "linear_grad_input", "linear_grad_weight"]
    calls.clear()
    products("linear", KernelMultiplier(LayerKernels(kernels=("dense", "csr", "dense"))))
    assert calls == ["pack_rows", "linear_grad_input"]


@pytest.mark.usefixtures("native_library")
def test_filters_are_packed_once_for_output_and_input_gradient(calls):
    products("3x3", KernelMultiplier(ALL["native"]))
    assert calls == ["pack_filters", "conv_forward", "conv_grad_input", "conv_grad_weight"]


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        ({"weights": 0.0}, ["linear_grad_weight"]),
        ({"activations": 0.0}, ["pack_rows", "linear_forward", "linear_grad_input"]),
        ({"weights": 0.0, "activations": 0.0}, []),
    ],
)
def test_a_product_without_a_threshold_is_dense(calls, sparsity, expected):
    assert_as_dense("linear", KernelMultiplier(ALL["csr"]), **sparsity)
    assert calls == expected


@pytest.mark.parametrize("shape", ["linear", "3x3"])
def test_under_autocast_products_are_dense(calls, shape):
    """A table that names native kernels needs no library then."""
    for name in ("native", "csr"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = products(shape, KernelMultiplier(ALL[name]))
            wanted = products(shape, DENSE)
        assert found[0].dtype == torch.bfloat16
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert calls == []


def test_a_library_that_cannot_be_had_has_a_reason(monkeypatch):
    """The tests above are skipped with it."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler was not found" in native.build()
