"""Split training with a window: the device runs ahead of the gradients that come back, which are then late.

    while micro-batches are left, or answers out:
        fewer than W are out:  forward of the next one with the weights of now; send what leaves it
        else:                  the oldest answer; its gradient, at the weights that its forward pass had, is accumulated;
                               at the end of a batch one step of the weights of now

This is delayed gradient descent (Langford, Smola and Zinkevich, NeurIPS 2009, arXiv 0911.0491, Algorithm 1) with a delay of at
most W - 1 micro-batches; that the weights of each forward pass are stashed for its backward pass is PipeDream's (Narayanan et
al., SOSP 2019, arXiv 1806.03377). The order of operations is fixed, so the result does not depend on when answers come. The
host is never late: it takes one micro-batch after another, each with the weights that the one before it left.

FedProx's term is taken at the weights that step, not at those of the forward pass.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from ..data.types import Samples, Transform
from ..parts.blocks import Blocks
from ..randomness import seeded
from ..spec import Training
from .split import returned, walk
from .training import Stepper, TrainingResult, autocast, laid_out


@dataclass(frozen=True)
class _Out:
    """A micro-batch that is out: what left the front, the weights that made it, and the samples of the batch that it ends."""

    activations: Tensor
    weights: list[Tensor]
    ends_batch_of: int


class _Front:
    """The device's blocks, run with copies of their tensors: the originals change while gradients are out."""

    def __init__(self, blocks: Blocks, names: tuple[str, ...], stepper: Stepper, training: Training) -> None:
        self._modules = [blocks.modules[name] for name in names]
        self._stepper, self._training = stepper, training
        self._stash: list[Tensor] | None = None

    def stepped(self) -> None:
        """The weights have changed: what is stashed is that of micro-batches that are out."""
        self._stash = None

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What leaves the front, and the weights that it was made with."""
        trained = self._stepper.parameters
        if self._stash is None:
            self._stash = [parameter.detach().clone().requires_grad_() for parameter in trained]
        weights = {id(parameter): copy for parameter, copy in zip(trained, self._stash, strict=True)}
        x = laid_out(inputs, self._training)
        with autocast(self._training):
            for module in self._modules:
                named = dict(module.named_parameters(remove_duplicate=False))
                # Buffers too: one that is changed in place may be what a backward pass has yet to look at.
                buffers = dict(module.named_buffers(remove_duplicate=False))
                copies = {id(buffer): buffer.clone() for buffer in buffers.values()}
                state = {name: weights.get(id(parameter), parameter) for name, parameter in named.items()}
                state |= {name: copies[id(buffer)] for name, buffer in buffers.items()}
                x = functional_call(module, state, (x,))
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
    """Train the ``front`` blocks with up to ``window`` micro-batches out; otherwise as ``train``.

    ``send``: takes activations (float32) and targets; ``receive``: gives the gradient (float32) of the oldest that were sent.
    ``over``: asked before each batch but the first whether to stop early: what is out is then waited for.
    The loss is the host's to report; here it is 0.
    """
    stepper = Stepper(blocks.model, training=training, trainable=trainable)
    if not len(samples):
        return TrainingResult()
    made, out = _Front(blocks, front, stepper, training), deque[_Out]()
    done = processed = 0
    generator = torch.Generator().manual_seed(seed)
    with stepper, seeded(seed):
        coming = walk(samples, training, seed=seed, over=over)
        while True:
            now = next(coming, None) if len(out) < window else None
            if now is not None:
                batch, ends_batch_of = now
                activations, weights = made.forward(transform(batch.x, generator))
                send(activations.detach().float(), batch.y)
                out.append(_Out(activations, weights, ends_batch_of))
            elif out:
                oldest = out.popleft()
                _backward(oldest, stepper, receive())
                if oldest.ends_batch_of:
                    stepper.step()
                    made.stepped()
                    done += 1
                    processed += oldest.ends_batch_of
            else:
                return TrainingResult(done, processed, 0.0, 0.0) if done else TrainingResult()


def _backward(out: _Out, stepper: Stepper, gradient: Tensor) -> None:
    """Add a micro-batch's gradient, at the weights that made it, to what the parameters have accumulated."""
    if not stepper.parameters:  # a front may be frozen as a whole
        return
    found = torch.autograd.grad(out.activations, out.weights, returned(gradient, out.activations), allow_unused=True)
    for parameter, each in zip(stepper.parameters, found, strict=True):
        if each is not None:
            # A copy, as autograd itself makes one: two parameters may have been given one and the same tensor.
            parameter.grad = each.clone() if parameter.grad is None else parameter.grad.add_(each)
