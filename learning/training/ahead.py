"""Split training with a window W: the device computes forward passes before earlier gradients have come back.

    while micro-batches are left, or gradients are outstanding:
        if fewer than W are outstanding: forward pass of the next micro-batch with the current weights; send its activations
        else: receive the oldest gradient, and accumulate the gradient of the weights of its forward pass;
              after the last micro-batch of a batch, one step of the current weights

This is delayed gradient descent (Langford, Smola and Zinkevich, NeurIPS 2009, arXiv 0911.0491, Algorithm 1) with a delay of at
most W - 1 micro-batches. Stashing the weights of each forward pass for its backward pass is PipeDream's method (Narayanan et
al., SOSP 2019, arXiv 1806.03377). The order of operations is fixed, so the result does not depend on when gradients
arrive. The host has no delay: it processes one micro-batch after another, each with the weights that the previous one left.

FedProx's term uses the current weights, not those of the forward pass.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..data.types import Samples, Transform
from ..parts.blocks import Blocks
from ..randomness import seeded
from ..spec import Training
from .precision import autocast, in_layout
from .recompute import call_with, is_trained, recomputed
from .split import as_returned, local_micro_batches
from .training import Stepper, TrainingResult


@dataclass(frozen=True)
class _Outstanding:
    """A micro-batch without its gradient: activations, the weights that they were computed with, and ``ends_batch_of``.

    ``ends_batch_of``: samples of the batch whose last micro-batch it is, else 0.
    """

    activations: Tensor
    weights: list[Tensor]
    ends_batch_of: int


class _Front:
    """The device's blocks, run with copies of their tensors: the originals change while gradients are outstanding."""

    def __init__(self, blocks: Blocks, names: tuple[str, ...], stepper: Stepper, training: Training) -> None:
        self._modules = [blocks.modules[name] for name in names]
        self._stepper, self._training = stepper, training
        self._stash: list[Tensor] | None = None

    def weights_changed(self) -> None:
        """Copy the weights again at the next forward pass. Outstanding micro-batches keep the earlier copy."""
        self._stash = None

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The activations, and the copy of the weights that they were computed with."""
        trained = self._stepper.parameters
        if self._stash is None:
            self._stash = [parameter.detach().clone().requires_grad_() for parameter in trained]
        weights = {id(parameter): copy for parameter, copy in zip(trained, self._stash, strict=True)}
        x = in_layout(inputs, self._training.layout)
        with autocast(self._training.precision):
            for module in self._modules:
                named = dict(module.named_parameters(remove_duplicate=False))
                # Buffers are copied too: a backward pass may need one that a later forward pass changes in place.
                buffers = dict(module.named_buffers(remove_duplicate=False))
                copies = {id(buffer): buffer.clone() for buffer in buffers.values()}
                state = {name: weights.get(id(parameter), parameter) for name, parameter in named.items()}
                state |= {name: copies[id(buffer)] for name, buffer in buffers.items()}
                call = partial(call_with, module, state)
                if self._training.checkpointing and is_trained(module):
                    x = recomputed(call, x, buffers=list(copies.values()), precision=self._training.precision)
                else:
                    x = call(x)
                with torch.no_grad():
                    for name, buffer in buffers.items():
                        buffer.copy_(state[name])
        return x, self._stash


def train_ahead(
    blocks: Blocks,
    front: tuple[str, ...],
    samples: Samples,
    *,
    training: Training,
    transform: Transform,
    seed: int,
    trainable: Sequence[str],
    window: int,
    send: Callable[[Tensor, Tensor], None],
    receive: Callable[[], Tensor],
    over: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train the ``front`` blocks with up to ``window`` outstanding micro-batches; otherwise as ``train``.

    ``send``: sends activations (float32) and targets. ``receive``: waits for the gradient (float32) of the oldest activations
    that were sent. ``over``: called before each batch but the first; once it returns true, no further batch is started, and the
    outstanding gradients are received. The losses of the result are 0, since the host reports them.
    """
    stepper = Stepper(blocks.model, training=training, trainable=trainable, stashes=True)
    if not len(samples):
        return TrainingResult()
    device, outstanding = _Front(blocks, front, stepper, training), deque[_Outstanding]()
    steps = processed = 0
    generator = torch.Generator().manual_seed(seed)
    with stepper, seeded(seed):
        micro_batches = local_micro_batches(samples, training, seed=seed, over=over)
        while True:
            following = next(micro_batches, None) if len(outstanding) < window else None
            if following is not None:
                batch, ends_batch_of = following
                activations, weights = device.forward(transform(batch.x, generator))
                send(activations.detach().float(), batch.y)
                outstanding.append(_Outstanding(activations, weights, ends_batch_of))
            elif outstanding:
                oldest = outstanding.popleft()
                _backward(oldest, stepper, receive())
                if oldest.ends_batch_of:
                    stepper.step()
                    device.weights_changed()
                    steps += 1
                    processed += oldest.ends_batch_of
            else:
                return TrainingResult(steps, processed, 0.0, 0.0) if steps else TrainingResult()


def _backward(outstanding: _Outstanding, stepper: Stepper, gradient: Tensor) -> None:
    """Accumulate a micro-batch's gradient, taken at the weights of its forward pass."""
    if not stepper.parameters:  # a front may be frozen as a whole
        return
    activations = outstanding.activations
    entering = as_returned(gradient, activations)
    gradients = torch.autograd.grad(activations, outstanding.weights, entering, allow_unused=True)
    for parameter, new in zip(stepper.parameters, gradients, strict=True):
        if new is not None:
            # A copy, as autograd itself makes one: two parameters may have got the same tensor object.
            parameter.grad = new.clone() if parameter.grad is None else parameter.grad.add_(new)
