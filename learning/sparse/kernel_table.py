"""Measures, before a run, which kernels are the fastest for each product of each sparse layer on this machine."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product

import msgspec
import torch
from torch import Tensor, nn

from ..randomness import preserved_rng, torch_threads
from ..spec import Kernel, KernelTable, LayerKernels, Layout, Sparsity, kernel_key
from .kernels import convolution, linear, native
from .kernels.measure import DENSE, LAST, Geometry, PassSeconds, geometry, measure
from .layers import sparse_layers

_LEAST_GAIN = 1.05  # a sparse kernel must be so many times as fast as the dense one: times vary from run to run
_SPARSE_KERNELS: tuple[Kernel, ...] = ("native", "csr")


def measure_kernels(
    model: nn.Module, sample: Tensor, *, batch: int, sparsities: Iterable[Sparsity], layout: Layout
) -> tuple[KernelTable, str]:
    """The fastest kernels of all sparse layers of ``model``, by ``kernel_key``, and why native ones are not available ("").

    ``sample``: an input without batch dimension; ``batch``: samples of a micro-batch. Layers of equal geometry are measured
    once. The native kernels are built if they have not been built on this machine yet.
    """
    missing = native.build()
    shapes = dict(_input_shapes(model, sample))
    table: KernelTable = {}
    found: dict[tuple[Geometry, int, float, float], LayerKernels] = {}
    for (name, layer), sparsity in product(list(sparse_layers(model)), sparsities):
        if not _can_be_sparse(layer) or name not in shapes or not (sparsity.weights or sparsity.activations):
            table[kernel_key(name, sparsity)] = LayerKernels()
            continue
        *leading, last = shapes[name]
        is_linear = isinstance(layer, nn.Linear)
        shape = geometry(layer, (last,) if is_linear else shapes[name])  # type: ignore[arg-type]
        rows = batch * math.prod(leading) if is_linear else batch
        key = shape, rows, sparsity.weights, sparsity.activations
        if key not in found:
            seconds = measure(
                shape,
                batch=rows,
                weight_sparsity=sparsity.weights,
                activation_sparsity=sparsity.activations,
                native=not missing,
            )
            row = fastest(seconds, layout=layout if len(shape.weight) == 4 else "contiguous")
            found[key] = _with_thresholds(row, sparsity)
        table[kernel_key(name, sparsity)] = found[key]
    return table, missing or ""


def fastest(seconds: dict[str, PassSeconds], *, layout: Layout = "contiguous") -> LayerKernels:
    """The kernels that take the least time, with packing.

    Output and input gradient share a packed weight, so they are chosen together. What packing takes is counted for the first
    of the two that needs it. ``layout``: the memory format of the run.
    """
    suffix = LAST if layout == "channels_last" else ""
    dense = seconds[DENSE + suffix]
    others = {name: seconds[name + suffix] for name in _SPARSE_KERNELS if name + suffix in seconds}
    packed: list[tuple[float, tuple[Kernel, Kernel], tuple[float, float]]] = []
    for name, own in others.items():
        for output, gradient in ((name, name), (name, "dense"), ("dense", name)):
            times = (
                own.pack + own.forward if output == name else dense.forward,
                (own.pack if output != name else 0.0) + own.grad_input if gradient == name else dense.grad_input,
            )
            packed.append((sum(times), (output, gradient), times))
    total, kernels, times = min(packed, default=(float("inf"), ("dense", "dense"), (0.0, 0.0)))
    if total * _LEAST_GAIN > dense.forward + dense.grad_input:
        kernels, times = ("dense", "dense"), (dense.forward, dense.grad_input)
    weight: list[tuple[float, Kernel]] = [(own.grad_weight, name) for name, own in others.items()]
    least, by = min(weight, default=(float("inf"), "dense"))
    if least * _LEAST_GAIN > dense.grad_weight:
        least, by = dense.grad_weight, "dense"
    return LayerKernels(
        kernels=(*kernels, by),
        times=(
            _ratio(times[0], dense.forward),
            _ratio(times[1], dense.grad_input),
            _ratio(least, dense.grad_weight),
        ),
    )


def _with_thresholds(row: LayerKernels, sparsity: Sparsity) -> LayerKernels:
    """A row in which products of whose operands nothing is left out are dense, as they are carried out."""
    sparse = (sparsity.weights > 0, sparsity.weights > 0, sparsity.activations > 0)
    kernels = [kernel if is_sparse else "dense" for kernel, is_sparse in zip(row.kernels, sparse, strict=True)]
    times = [time if is_sparse else 1.0 for time, is_sparse in zip(row.times, sparse, strict=True)]
    return msgspec.convert({"kernels": kernels, "times": times}, LayerKernels)


def _ratio(seconds: float, dense: float) -> float:
    """Relative time, to three digits: no more of it is meaningful."""
    return round(seconds / dense, 3) if dense > 0 else 1.0


def _can_be_sparse(layer: nn.Module) -> bool:
    """Whether there are sparse kernels for a layer."""
    if isinstance(layer, nn.Conv2d):
        return convolution.supports(layer)
    return isinstance(layer, nn.Linear) and linear.supports(layer)


def _input_shapes(model: nn.Module, sample: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shape of each sparse layer's input, without the batch dimension. A layer that is not called has none."""
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, tuple(inputs[0].shape[1:]))

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in sparse_layers(model)]
    try:
        with torch_threads(1), preserved_rng(), torch.no_grad():
            model.eval()(sample.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    yield from seen.items()
