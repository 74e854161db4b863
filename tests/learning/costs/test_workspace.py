"""What convolutions need inside themselves, by hand, and predictions of processes."""

import torch
from fedbonsai.learning.costs import workspace
from fedbonsai.learning.costs.memory import Allocations, peak_of_batch, process_bytes
from torch import nn
from torch.nn import functional as F


def step(samples: int) -> Allocations:
    """A convolution of 4 x 4 images, one channel to two: 64 and 128 bytes a sample, and weights of 72 bytes."""
    x, weight = torch.ones(samples, 1, 4, 4), nn.Parameter(torch.ones(2, 1, 3, 3))
    with Allocations() as memory:
        memory.add([x, weight])
        F.conv2d(x, weight, padding=1).sum().backward()
    return memory


def test_a_convolution_copies_what_it_reorders_and_is_compiled_forward_and_backward() -> None:
    """Forward output and weight; for the weight's gradient input and output's gradient."""
    memory = step(3)
    scratch = [memory.sizes[number] for number in sorted(memory.scratch)]
    assert scratch == [3 * 128 + 72, 3 * (64 + 128), 72]
    assert len(memory.kernels) == 2


def test_the_gradient_of_an_input_alone_copies_the_output_s_gradient_and_the_weight() -> None:
    x, weight = torch.ones(3, 1, 4, 4, requires_grad=True), torch.ones(2, 1, 3, 3)
    with Allocations() as memory:
        F.conv2d(x, weight, padding=1).sum().backward()
    assert [memory.sizes[number] for number in sorted(memory.scratch)] == [3 * 128 + 72] * 2


def test_the_larger_of_weight_and_activations_counts_at_any_batch_size() -> None:
    """A weight of 1,152 bytes, and 48 bytes of activations and gradients a sample."""

    def trained(samples: int) -> Allocations:
        x, weight = torch.ones(samples, 4, 1, 1), nn.Parameter(torch.ones(8, 4, 3, 3))
        with Allocations() as memory:
            F.conv2d(x, weight, padding=1).sum().backward()
        return memory

    small, large = trained(2), trained(4)
    assert peak_of_batch(small, large, 500, scratch=True) == peak_of_batch(trained(500), trained(500), 2, scratch=True)


def test_scratch_counts_where_it_is_needed_and_not_among_the_tensors() -> None:
    memory = step(3)
    tensors = memory.peak_bytes
    live = 3 * 64 + 72 + 3 * 128  # when the forward pass reorders
    assert max(tensors, live + 3 * 128 + 72) <= peak_of_batch(memory, memory, 2, scratch=True)
    assert peak_of_batch(memory, memory, 2) == tensors
    assert memory.live_bytes <= tensors


def test_the_prediction_of_a_process_follows_the_batch() -> None:
    small, large, direct = step(2), step(4), step(50)
    expected = workspace.predicted_bytes(peak_of_batch(direct, direct, 2, scratch=True), num_kernels=2)
    assert process_bytes(small, large, 50) == expected


def test_operations_of_other_kinds_need_nothing_that_is_known() -> None:
    with Allocations() as memory:
        (torch.ones(3, 4) @ torch.ones(4, 5)).relu()
    assert (memory.scratch, memory.kernels) == (set(), set())
    assert (
        workspace.predicted_bytes(1_000_000, num_kernels=0) == int(workspace.FACTOR * 1_000_000) + workspace.FIXED_BYTES
    )
