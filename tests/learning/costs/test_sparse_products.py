"""FLOPs of layers with sparse products: those of dense ones, times what their kernels were measured to take."""

import pytest
import torch
import torch.nn.functional as F
from fedbonsai.learning.costs.cost import part_cost
from fedbonsai.learning.models.cnn import digits_cnn
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.parts.submodel import compile_part
from fedbonsai.learning.sparse.selection import make_sparse
from fedbonsai.learning.spec import LayerKernels, Sparsity, Training, kernel_key
from torch import nn

SPARSITY = Sparsity(weights=0.5, activations=0.5, layers=("1",))
HALF = LayerKernels(times=(0.5, 0.25, 0.125))


def network():
    """4 to 8 to 8 to 2: 32, 64 and 16 multiplications a sample; the middle layer is sparse."""
    return nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((4, 8), (8, 8), (8, 2))))


def cost(row=None, *, plan=SPARSITY, trained=("0", "1", "2"), **training):
    """The cost of the network with this row of kernels at ``SPARSITY``."""
    table = {} if row is None else {kernel_key("1", SPARSITY): row}
    blocks = cut(make_sparse(network(), SPARSITY, table))
    part = whole(blocks.spec) if len(trained) == 3 else Part(blocks=("0", "1", "2"), trained=trained)
    example = torch.zeros(4), torch.zeros(2)
    settings = Training(sparsity=plan, **training)
    return part_cost(compile_part(part, blocks), example=example, training=settings, loss=F.mse_loss)


# Forward; weights of all layers, and the input's gradients of the last two.
FORWARD, BACKWARD = 2 * (32 + 64 + 16), 2 * (32 + 64 + 16) + 2 * (64 + 16)


def test_without_measured_kernels_sparse_training_counts_as_dense_training():
    found = cost()
    assert (found.forward_flops, found.training_flops) == (FORWARD, FORWARD + BACKWARD)


def test_each_product_counts_as_its_measured_time():
    found = cost(HALF)
    assert found.forward_flops == 2 * (32 + 64 * 0.5 + 16)
    of_weights, of_inputs = 2 * (32 + 64 * 0.125 + 16), 2 * (64 * 0.25 + 16)
    assert found.training_flops == found.forward_flops + of_weights + of_inputs


def test_memory_does_not_depend_on_the_kernels():
    assert cost(HALF).peak_memory_bytes == cost().peak_memory_bytes


def test_a_plan_of_another_sparsity_counts_as_dense():
    other = Sparsity(weights=0.75, activations=0.75, layers=("1",))
    assert cost(HALF, plan=other).training_flops == FORWARD + BACKWARD


def test_under_autocast_products_are_dense_and_count_as_such():
    assert cost(HALF, precision="bf16").training_flops == FORWARD + BACKWARD


@pytest.mark.parametrize("kernel", ["dense", "csr"])
def test_a_frozen_layer_counts_too(kernel):
    """Its forward pass is that of evaluation, and the counter does not see the products of other kernels."""
    row = LayerKernels(kernels=(kernel,) * 3, times=HALF.times)
    assert cost(row, trained=("2",)).training_flops == 2 * (32 + 64 * 0.5 + 16) + 2 * 16


def test_memory_of_large_batches_is_that_of_a_dense_step():
    """What thresholds need lives for a moment only, and both steps of a dry run find their own."""
    found = []
    for sparsity in (None, Sparsity()):
        model = digits_cnn() if sparsity is None else make_sparse(digits_cnn(), sparsity)
        blocks = cut(model)
        example, settings = (torch.zeros(1, 8, 8), torch.tensor(1)), Training(batch_size=128, sparsity=sparsity)
        part = compile_part(whole(blocks.spec), blocks)
        found.append(part_cost(part, example=example, training=settings, loss=F.cross_entropy).peak_memory_bytes)
    assert found[1] == pytest.approx(found[0], rel=0.001)
