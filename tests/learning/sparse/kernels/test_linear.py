import pytest
import torch
from fedbonsai.learning.sparse.kernels import csr, linear
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn


@pytest.fixture(params=["csr", "native"], scope="module")
def kernel(request):
    if request.param == "native":
        request.getfixturevalue("native_library")
        return linear
    return csr


def active(x: Tensor, threshold: float) -> Tensor:
    return torch.where(x.abs() < threshold, 0.0, x)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-3)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)


@given(
    samples=st.integers(1, 70),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 140),
    threshold=st.sampled_from([1e-30, 0.7, 1.6, 100.0]),
    x_threshold=st.sampled_from([1e-30, 1.6, 100.0]),
    is_transposed=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_passes_equal_dense_ones_on_masked_operands(
    kernel, samples, inputs, outputs, threshold, x_threshold, is_transposed, has_bias, seed
) -> None:
    torch.manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(columns, rows).T if is_transposed else torch.randn(rows, columns)

    x, g, weight = random(samples, inputs), random(samples, outputs), random(outputs, inputs)
    bias = torch.randn(outputs) if has_bias else None
    masked, packed = active(weight, threshold), kernel.pack_rows(weight, threshold)
    assert_close(kernel.linear_forward(x, packed, bias), nn.functional.linear(x, masked, bias))
    assert_close(kernel.linear_grad_input(g, packed), g @ masked)
    assert_close(kernel.linear_grad_weight(g, x, x_threshold), g.T @ active(x, x_threshold))


def test_a_pencil_sized_layer(kernel) -> None:
    packed = kernel.pack_rows(torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, 1.0]]), 2.0)
    x, g = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0]])
    assert kernel.linear_forward(x, packed, torch.tensor([0.5, 0.25])).tolist() == [[5.5, 4.25]]
    assert kernel.linear_grad_input(g, packed).tolist() == [[40.0, -2.0, 3.0]]
    assert kernel.linear_grad_weight(g, x, 2.0).tolist() == [[0.0, 2.0, 3.0], [0.0, 20.0, 30.0]]


def test_a_weight_that_is_not_a_number_is_active(kernel) -> None:
    packed = kernel.pack_rows(torch.tensor([[float("nan"), 0.1]]), 0.5)
    assert kernel.linear_forward(torch.ones(1, 2), packed, None).isnan().all()


def test_a_weight_that_needs_a_gradient_is_packed(kernel) -> None:
    weight = nn.Parameter(torch.eye(3))
    assert_close(
        kernel.linear_forward(torch.ones(2, 3), kernel.pack_rows(weight, 0.5), None).detach(), torch.ones(2, 3)
    )


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_gradient_that_is_larger_than_the_caches(share: float) -> None:
    """It is written past them; 1,031 columns are no multiple of a vector."""
    torch.manual_seed(0)
    g = torch.randn(5, 1040)
    x = torch.rand(5, 1031) * (torch.rand(5, 1031) < share)
    assert_close(linear.linear_grad_weight(g, x, 1e-30), g.T @ x)


@pytest.mark.usefixtures("native_library")
@given(
    samples=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    threshold=st.sampled_from([1e-30, 1.6, 2.5, 100.0]),
    seed=st.integers(0, 9),
)
def test_an_update_is_a_step_of_sgd(samples, inputs, outputs, threshold, seed) -> None:
    torch.manual_seed(seed)
    x, g, weight = torch.randn(samples, inputs), torch.randn(samples, outputs), torch.randn(outputs, inputs)
    masked, expected = active(x, threshold), weight - 0.1 * (g.T @ active(x, threshold))
    found = nn.Parameter(weight.clone())
    linear.linear_update(found, g, x, threshold, -0.1)
    assert_close(found.detach(), expected)
    untouched = ~(masked != 0).any(0)
    assert torch.equal(found[:, untouched], weight[:, untouched])


@pytest.mark.usefixtures("native_library")
def test_operands_that_do_not_fit_are_errors() -> None:
    packed = linear.pack_rows(torch.ones(4, 3), 0.5)
    for run in (
        lambda: linear.linear_forward(torch.ones(2, 4), packed, None),
        lambda: linear.linear_grad_input(torch.ones(2, 3), packed),
        lambda: linear.linear_grad_weight(torch.ones(2, 4), torch.ones(3, 3), 0.5),
        lambda: linear.linear_update(torch.ones(4, 3), torch.ones(2, 3), torch.ones(2, 3), 0.5, -0.1),
        lambda: linear.linear_update(torch.ones(3, 4).T, torch.ones(2, 4), torch.ones(2, 3), 0.5, -0.1),
    ):
        with pytest.raises(RuntimeError, match="does not fit"):
            run()


def test_what_is_supported() -> None:
    assert linear.supports(nn.Linear(2, 3))
    assert not linear.supports(nn.Linear(2, 3, dtype=torch.float64))
