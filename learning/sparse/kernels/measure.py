"""Times of one layer's passes on this machine: dense, and by each sparse kernel that is available.

A step of a layer is: pack the active weights, forward, gradient of the input, gradient of the weight. For dense operations
"pack" is nothing: masked weights cost as much as others. Values are random, from a
fixed seed; positive activations are as after a ReLU, so the sparse kernels meet the zeros of training.

The kernels take turns, and the fastest of several turns counts, which other load on the machine disturbs least.
"""

import time
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor, nn

from ...randomness import seeded, torch_threads
from . import convolution, csr, linear

aten = torch.ops.aten
DENSE, NATIVE, CSR = "dense", "native", "csr"
LAST = "_channels_last"  # added to the name of a kernel whose tensors are in that format
Passes = dict[str, Callable[[], object]]
# The thread's own processor time, which other processes lengthen less, where it is fine enough. (On Windows it is not.)
_clock = time.thread_time if time.get_clock_info("thread_time").resolution <= 1e-6 else time.perf_counter


class PassSeconds(msgspec.Struct, frozen=True):
    """Seconds of each pass of one layer by one kernel."""

    pack: float
    forward: float
    grad_input: float
    grad_weight: float

    @property
    def step(self) -> float:
        """Of all passes."""
        return self.pack + self.forward + self.grad_input + self.grad_weight


class Geometry(msgspec.Struct, frozen=True):
    """One layer and its input: a convolution where the input has three dimensions, or a linear layer where it has one."""

    weight: tuple[int, ...]  # [out, in, height, width] or [out, in]
    input: tuple[int, ...]  # of one sample: [in, height, width] or [in]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


def geometry(layer: nn.Conv2d | nn.Linear, input_shape: tuple[int, ...]) -> Geometry:
    """The geometry of a layer whose input has this shape, without the dimension of samples."""
    if isinstance(layer, nn.Linear):
        return Geometry(tuple(layer.weight.shape), input_shape)
    if isinstance(layer.padding, str):
        raise ValueError(f"padding {layer.padding!r}: numbers are allowed")
    (down, across), (top, left) = layer.stride, layer.padding
    return Geometry(tuple(layer.weight.shape), input_shape, (down, across), (top, left))


def measure(
    layer: Geometry,
    *,
    batch: int,
    weight_sparsity: float,
    activation_sparsity: float,
    native: bool,
    turns: int = 3,
    seed: int = 0,
) -> dict[str, PassSeconds]:
    """Seconds of each pass, on one thread, by kernel: ``dense``; ``native`` (which has to be loaded) if it is True; more.

    The kernels of a convolution are measured in both memory formats, the other one as ``dense_channels_last`` and
    ``native_channels_last`` (the native ones have a contiguous weight in both); a linear layer adds ``csr``.
    """
    with torch_threads(1), seeded(seed), torch.no_grad():
        weight = torch.randn(layer.weight)
        x = torch.randn(batch, *layer.input).relu_()
        thresholds = _threshold(weight, weight_sparsity), _threshold(x, activation_sparsity)
        is_linear = len(layer.weight) == 2
        kernels = (
            _linear_kernels(weight, x, *thresholds, native=native)
            if is_linear
            else _conv_kernels(layer, weight, x, *thresholds, native=native)
        )
        return _fastest(kernels, turns)


def _threshold(values: Tensor, sparsity: float) -> float:
    """The magnitude that the given share of values is below; the smallest positive one where that share is of zeros."""
    magnitudes = values.abs().flatten()
    rank = min(int(sparsity * len(magnitudes)) + 1, len(magnitudes))
    return max(float(magnitudes.kthvalue(rank).values), torch.finfo(torch.float32).tiny)


def _linear_kernels(weight: Tensor, x: Tensor, at: float, x_at: float, *, native: bool) -> dict[str, Passes]:
    g = torch.randn(len(x), len(weight))
    by_rows = csr.pack_rows(weight, at)
    kernels: dict[str, Passes] = {
        DENSE: {
            "pack": _nothing,
            "forward": lambda: x @ weight.T,
            "grad_input": lambda: g @ weight,
            "grad_weight": lambda: g.T @ x,
        },
        CSR: {
            "pack": lambda: csr.pack_rows(weight, at),
            "forward": lambda: csr.linear_forward(x, by_rows, None),
            "grad_input": lambda: csr.linear_grad_input(g, by_rows),
            "grad_weight": lambda: csr.linear_grad_weight(g, x, x_at),
        },
    }
    if native:
        packed = linear.pack_rows(weight, at)
        kernels[NATIVE] = {
            "pack": lambda: linear.pack_rows(weight, at),
            "forward": lambda: linear.linear_forward(x, packed, None),
            "grad_input": lambda: linear.linear_grad_input(g, packed),
            "grad_weight": lambda: linear.linear_grad_weight(g, x, x_at),
        }
    return kernels


def _conv_kernels(
    layer: Geometry, weight: Tensor, x: Tensor, at: float, x_at: float, *, native: bool
) -> dict[str, Passes]:
    g = torch.randn_like(aten.convolution(x, weight, None, layer.stride, layer.padding, (1, 1), False, (0, 0), 1))
    x_last, g_last, weight_last = (each.to(memory_format=torch.channels_last) for each in (x, g, weight))
    kernels = {
        DENSE: _dense_conv(layer, x, weight, g),
        DENSE + LAST: _dense_conv(layer, x_last, weight_last, g_last),
    }
    if native:
        kernels[NATIVE] = _native_conv(layer, x, weight, g, at, x_at)
        kernels[NATIVE + LAST] = _native_conv(layer, x_last, weight, g_last, at, x_at)
    return kernels


def _native_conv(layer: Geometry, x: Tensor, weight: Tensor, g: Tensor, at: float, x_at: float) -> Passes:
    packed, where = convolution.pack_filters(weight, at), (layer.stride, layer.padding)
    return {
        "pack": lambda: convolution.pack_filters(weight, at),
        "forward": lambda: convolution.conv_forward(x, packed, None, *where),
        "grad_input": lambda: convolution.conv_grad_input(g, packed, x.shape, *where),
        "grad_weight": lambda: convolution.conv_grad_weight(g, x, x_at, weight.shape, *where),
    }


def _dense_conv(layer: Geometry, x: Tensor, weight: Tensor, g: Tensor) -> Passes:
    shape = layer.stride, layer.padding, (1, 1), False, (0, 0), 1

    def backward(*wanted: bool) -> object:
        return aten.convolution_backward(g, x, weight, None, *shape, (*wanted, False))

    return {
        "pack": _nothing,
        "forward": lambda: aten.convolution(x, weight, None, *shape),
        "grad_input": lambda: backward(True, False),
        "grad_weight": lambda: backward(False, True),
    }


def _nothing() -> None:
    """Dense passes read the weight as it is."""


def _fastest(kernels: dict[str, Passes], turns: int) -> dict[str, PassSeconds]:
    """The fastest of some turns for each pass; the first turn also warms caches."""
    best = {(kernel, name): float("inf") for kernel, passes in kernels.items() for name in passes}
    for _ in range(turns):
        for kernel, passes in kernels.items():
            for name, run in passes.items():
                begun = _clock()
                run()
                best[kernel, name] = min(best[kernel, name], _clock() - begun)
    return {
        kernel: PassSeconds(**{name: 0.0 if run is _nothing else best[kernel, name] for name, run in passes.items()})
        for kernel, passes in kernels.items()
    }
