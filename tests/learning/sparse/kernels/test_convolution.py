import pytest
import torch
import torch.nn.functional as F
from fedbonsai.learning.sparse.kernels.convolution import (
    conv_forward,
    conv_grad_input,
    conv_grad_weight,
    pack_filters,
    supports,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("native_library")
small = st.integers(1, 5)
FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
}


def active(x: Tensor, threshold: float) -> Tensor:
    return torch.where(x.abs() < threshold, 0.0, x)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-3)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, at: float, x_at: float, layout) -> None:
    masked = active(weight, at)
    y = F.conv2d(x, masked, bias, stride, padding)
    g = layout(torch.randn_like(y))
    packed = pack_filters(weight, at)
    assert packed.density == pytest.approx(float((masked != 0).float().mean()))
    assert_close(conv_forward(x, packed, bias, stride, padding), y)
    gx = torch.nn.grad.conv2d_input(x.shape, masked, g, stride, padding)
    assert_close(conv_grad_input(g, packed, x.shape, stride, padding), gx)
    gw = torch.nn.grad.conv2d_weight(active(x, x_at), weight.shape, g, stride, padding)
    assert_close(conv_grad_weight(g, x, x_at, weight.shape, stride, padding), gw)


@given(
    samples=st.integers(1, 35),
    channels=st.integers(1, 35),
    filters=st.one_of(st.integers(1, 35), st.integers(60, 140)),
    kernel=st.tuples(small, small),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1)]),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    threshold=st.sampled_from([1e-30, 0.7, 1.6, 100.0]),
    x_threshold=st.sampled_from([1e-30, 1.6, 100.0]),
    layout=st.sampled_from(list(FORMATS)),
    g_layout=st.sampled_from(list(FORMATS)),
    has_bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_passes_equal_dense_ones_on_masked_operands(
    samples, channels, filters, kernel, stride, padding, size, threshold, x_threshold, layout, g_layout, has_bias, seed
) -> None:
    assume(all(size[i] + 2 * padding[i] >= kernel[i] for i in (0, 1)))
    torch.manual_seed(seed)
    x = FORMATS[layout](torch.randn(samples, channels, *size))
    weight, bias = torch.randn(filters, channels, *kernel), torch.randn(filters) if has_bias else None
    check(x, weight, bias, stride, padding, threshold, x_threshold, FORMATS[g_layout])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("samples", "channels", "filters", "size", "kernel", "stride", "padding"),
    [(32, 64, 64, 32, 3, 1, 1), (20, 128, 256, 16, 3, 2, 1), (10, 1, 32, 28, 5, 1, 2), (10, 32, 64, 14, 5, 1, 2)],
)
def test_layers_of_usual_networks(samples, channels, filters, size, kernel, stride, padding, layout) -> None:
    torch.manual_seed(0)
    x = FORMATS[layout](torch.randn(samples, channels, size, size).relu())
    weight = torch.randn(filters, channels, kernel, kernel)
    check(x, weight, torch.randn(filters), (stride,) * 2, (padding,) * 2, 1.6, 2.0, FORMATS[layout])


@pytest.mark.parametrize("zero", ["x", "weight", "g"])
def test_operands_of_zeros(zero: str) -> None:
    operands = {"x": torch.ones(3, 2, 4, 4), "weight": torch.ones(5, 2, 3, 3), "g": torch.ones(3, 5, 4, 4)}
    operands[zero] = torch.zeros_like(operands[zero])
    x, weight, g = operands.values()
    where = (1, 1), (1, 1)
    packed = pack_filters(weight, 1e-30)
    assert_close(conv_forward(x, packed, None, *where), F.conv2d(x, weight, None, *where))
    assert_close(conv_grad_input(g, packed, x.shape, *where), torch.nn.grad.conv2d_input(x.shape, weight, g, *where))
    gw = torch.nn.grad.conv2d_weight(x, weight.shape, g, *where)
    assert_close(conv_grad_weight(g, x, 1e-30, weight.shape, *where), gw)


def test_a_pencil_sized_convolution() -> None:
    """One filter [1, 3] of which 2 is too small; inputs below 2 count in forward, and not in the weight's gradient."""
    weight = torch.tensor([[[[4.0, 2.0, -3.0]]]])
    packed = pack_filters(weight, 3.0)
    assert packed.indices.tolist() == [0, 2]
    assert packed.values.tolist() == [4.0, -3.0]
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    assert conv_forward(x, packed, None, (1, 1), (0, 0)).tolist() == [[[[-5.0, -4.0]]]]
    g = torch.tensor([[[[1.0, 10.0]]]])
    assert conv_grad_input(g, packed, x.shape, (1, 1), (0, 0)).tolist() == [[[[4.0, 40.0, -3.0, -30.0]]]]
    assert conv_grad_weight(g, x, 2.0, weight.shape, (1, 1), (0, 0)).tolist() == [[[[20.0, 32.0, 43.0]]]]


def test_an_element_at_the_threshold_is_active_and_so_is_one_that_is_not_a_number() -> None:
    weight = torch.tensor([0.5, -0.5, 0.49, -0.49, float("nan"), 0.0]).reshape(6, 1, 1, 1)
    packed = pack_filters(weight, 0.5)
    assert packed.pointers.tolist() == [0, 1, 2, 2, 2, 3, 3]
    y = conv_forward(torch.ones(1, 1, 1, 1), packed, None, (1, 1), (0, 0)).flatten()
    assert y[:4].tolist() == [0.5, -0.5, 0.0, 0.0]
    assert y[4].isnan()


def test_results_have_the_format_of_the_input() -> None:
    packed = pack_filters(torch.randn(4, 3, 3, 3), 0.5)
    x = torch.randn(2, 3, 8, 8)
    last = x.to(memory_format=torch.channels_last)
    assert conv_forward(x, packed, None, (1, 1), (1, 1)).is_contiguous()
    assert conv_forward(last, packed, None, (1, 1), (1, 1)).is_contiguous(memory_format=torch.channels_last)
    one = torch.randn(2, 1, 8, 8)  # dense in both formats: its strides decide
    packed_one = pack_filters(torch.randn(4, 1, 3, 3), 0.5)
    assert conv_forward(one, packed_one, None, (1, 1), (1, 1)).is_contiguous()
    one = one.to(memory_format=torch.channels_last)
    y = conv_forward(one, packed_one, None, (1, 1), (1, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    assert conv_grad_input(g, packed, x.shape, (1, 1), (1, 1)).is_contiguous(memory_format=torch.channels_last)


def test_a_batch_without_samples() -> None:
    packed, x, g = pack_filters(torch.ones(4, 3, 3, 3), 0.5), torch.ones(0, 3, 8, 8), torch.ones(0, 4, 6, 6)
    assert conv_forward(x, packed, None, (1, 1), (0, 0)).shape == (0, 4, 6, 6)
    assert conv_grad_input(g, packed, x.shape, (1, 1), (0, 0)).shape == x.shape
    assert not conv_grad_weight(g, x, 0.5, packed.shape, (1, 1), (0, 0)).any()


def test_results_are_equal_bit_for_bit_when_repeated() -> None:
    torch.manual_seed(0)
    x, g, weight = torch.randn(17, 9, 11, 11), torch.randn(17, 33, 11, 11), torch.randn(33, 9, 3, 3)
    packed = pack_filters(weight, 1.0)
    for run in (
        lambda: conv_forward(x, packed, None, (1, 1), (1, 1)),
        lambda: conv_grad_input(g, packed, x.shape, (1, 1), (1, 1)),
        lambda: conv_grad_weight(g, x, 1.0, weight.shape, (1, 1), (1, 1)),
    ):
        assert torch.equal(run(), run())


def test_operands_that_do_not_fit_are_errors() -> None:
    packed = pack_filters(torch.ones(4, 3, 3, 3), 0.5)
    with pytest.raises(RuntimeError, match="does not fit filters"):
        conv_forward(torch.ones(2, 5, 8, 8), packed, None, (1, 1), (1, 1))
    with pytest.raises(RuntimeError, match="smaller than the kernel"):
        conv_forward(torch.ones(2, 3, 2, 2), packed, None, (1, 1), (0, 0))
    with pytest.raises(RuntimeError, match="each of its numbers is 1 or 2"):
        conv_forward(torch.ones(2, 3, 8, 8), packed, None, (3, 3), (0, 0))
    with pytest.raises(RuntimeError, match="does not fit input"):
        conv_grad_input(torch.ones(2, 4, 8, 8), packed, (2, 3, 8, 8), (1, 1), (0, 0))
    with pytest.raises(RuntimeError, match="does not fit input"):
        conv_grad_weight(torch.ones(2, 4, 8, 8), torch.ones(3, 3, 8, 8), 0.5, (4, 3, 3, 3), (1, 1), (1, 1))
    with pytest.raises(RuntimeError, match="has to be above 0"):
        pack_filters(torch.ones(4, 3, 3, 3), 0.0)
    with pytest.raises(RuntimeError, match="Float"):
        conv_forward(torch.ones(2, 3, 8, 8, dtype=torch.float64), packed, None, (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("change", "supported"),
    [
        ({}, True),
        ({"stride": 2, "padding": 5, "kernel_size": (1, 7)}, True),
        ({"stride": 3}, False),
        ({"dilation": 2}, False),
        ({"groups": 2}, False),
        ({"padding": "same"}, False),
        ({"padding": 1, "padding_mode": "reflect"}, False),
        ({"dtype": torch.float64}, False),
    ],
)
def test_what_is_supported(change, supported: bool) -> None:
    assert supports(nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3} | change)) is supported
