"""Split training: the device trains the first blocks of a network and a host the others; both exchange the cut's tensors.

    device                                   host
    z = front(x)        z, y  ------------>  loss(back(z), y)
    front's gradient  <------------  dloss/dz, and the gradient of its own blocks

This is SplitFed's first version (Thapa et al., AAAI 2022, arXiv 2004.12088): the host has one copy of its blocks for each
device, and both legs have their own optimiser. If gradients come back before the next batch (window 1), each leg changes its
blocks as training of the whole model does, bit for bit, and both together are FedAvg. That holds in float32 and under bf16
autocast, in any memory format and on any processor, as long as both legs run on processors of the same kind: tensors that cross
the cut keep their memory format (``learning.tensors``).

Random numbers (dropout) that are drawn on one side of the cut only are the same as in the whole model. If both sides draw, the
host's come from the same seed, but differ from those of the whole model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import batches, micro_batches, until
from ..data.types import Samples, Transform
from ..parts.blocks import Blocks
from ..parts.part import Part
from ..parts.submodel import compile_part
from ..randomness import RandomStream, preserved_rng
from ..spec import Training
from .losses import Loss, scalar_loss
from .precision import autocast, in_layout
from .recompute import run_blocks
from .training import Stepper

Exchange = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What both legs know of a micro-batch in advance: samples, share of its batch, and whether it is the last of the batch."""

    samples: int
    share: float
    ends_batch: bool


def micro_batch_schedule(num_samples: int, training: Training) -> Iterator[MicroBatch]:
    """The micro-batches of one plan, in order. Their sizes do not depend on the seed."""
    for indices in batches(
        num_samples, batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=0
    ):
        parts = list(micro_batches(indices, batch_size=training.batch_size, accumulation=training.accumulation))
        for number, (part, share) in enumerate(parts, 1):
            yield MicroBatch(len(part), share, number == len(parts))


def local_micro_batches(
    samples: Samples, training: Training, *, seed: int, over: Callable[[], bool] | None = None
) -> Iterator[tuple[Samples, int]]:
    """Yield a device's micro-batches in the order of ``train``.

    With the last micro-batch of a batch comes the number of samples in the batch, with all others 0. ``over``: called before
    each batch but the first; the iteration stops early once it returns true.
    """
    order = batches(
        len(samples), batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=seed
    )
    for indices in until(order, over):
        parts = [
            part
            for part, _ in micro_batches(indices, batch_size=training.batch_size, accumulation=training.accumulation)
        ]
        for number, part in enumerate(parts, 1):
            yield samples.take(part), len(indices) if number == len(parts) else 0


@dataclass(frozen=True)
class Boundary:
    """The tensor that crosses a cut: its shape for each sample, and its type in the network (bfloat16 under autocast, say)."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def boundary(blocks: Blocks, front: tuple[str, ...], *, example: Tensor, training: Training) -> Boundary:
    """Shape and type of the output of the ``front`` blocks for inputs like ``example``, found by a run on two copies of it.

    Raises ``ValueError`` if the output is not one floating-point tensor with a batch dimension.
    """
    with preserved_rng(), torch.no_grad(), autocast(training.precision):
        x = example.unsqueeze(0).expand(2, *example.shape).contiguous()
        for name in front:
            block = blocks.modules[name]
            buffers = {key: buffer.clone() for key, buffer in block.named_buffers()}  # the model's own do not change
            x = torch.func.functional_call(block, buffers, (x,))
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1 or x.shape[0] != 2:
        raise ValueError(f"the output of block {front[-1]!r} is not one floating-point tensor with a batch dimension")
    return Boundary(tuple(x.shape[1:]), x.dtype)


class DeviceLeg:
    """Gradients of a device's blocks from a host; the ``gradient`` argument of ``train``."""

    def __init__(self, blocks: Blocks, front: tuple[str, ...], *, training: Training, exchange: Exchange) -> None:
        """``exchange``: sends activations (float32) and targets to the host, and returns the activations' gradient (float32).

        Both are in the memory format that they have inside the network.
        """
        self._blocks, self._front, self._training, self._exchange = blocks, front, training, exchange

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Process one micro-batch. Returns 0, since the host reports the loss."""
        activations = _forward(self._blocks, self._front, inputs, self._training)
        gradient = self._exchange(activations.detach().float(), targets)
        if activations.requires_grad:  # a front may be frozen as a whole
            activations.backward(as_returned(gradient, activations))  # type: ignore[no-untyped-call]
        return 0.0


def _forward(blocks: Blocks, front: tuple[str, ...], inputs: Tensor, training: Training) -> Tensor:
    """Output of the ``front`` blocks, in the memory format and precision of ``training``."""
    with autocast(training.precision):
        x = in_layout(inputs, training.layout)
        recomputes = training.checkpointing and torch.is_grad_enabled()
        activations: Tensor = (
            run_blocks(blocks, front, x, precision=training.precision) if recomputes else blocks.run(front, x)
        )
    return activations


def as_returned(gradient: Tensor, activations: Tensor) -> Tensor:
    """A received gradient in the type of ``activations``; a copy, since autograd may keep a reference to it."""
    return gradient.to(activations.dtype, copy=True)


def forward_only(
    blocks: Blocks,
    front: tuple[str, ...],
    samples: Samples,
    *,
    training: Training,
    transform: Transform,
    seed: int,
    send: Callable[[Tensor, Tensor], None],
) -> None:
    """Send the activations of a frozen front, micro-batch by micro-batch, in the order of ``train``.

    The front runs in evaluation mode, so its output depends on the sample and the transform alone, not on the batch.
    """
    for name in front:
        blocks.modules[name].eval()
    generator = torch.Generator().manual_seed(seed)
    for batch, _ in local_micro_batches(samples, training, seed=seed):
        with torch.no_grad():
            activations = _forward(blocks, front, transform(batch.x, generator), training)
        send(activations.float(), batch.y)


class LocalLeg:
    """Gradients of a device's blocks from a local loss behind an auxiliary head; the ``gradient`` argument of ``train``.

    The activations are also sent to the host, before the backward pass, and no gradient comes back.
    """

    def __init__(
        self,
        blocks: Blocks,
        front: tuple[str, ...],
        head: nn.Module,
        *,
        training: Training,
        loss: Loss,
        send: Callable[[Tensor, Tensor], None],
    ) -> None:
        """``send``: sends activations (float32) and targets to the host."""
        self._blocks, self._front, self._head = blocks, front, head
        self._training, self._loss, self._send = training, loss, send

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """Process one micro-batch; returns the local loss."""
        activations = _forward(self._blocks, self._front, inputs, self._training)
        self._send(activations.detach().float(), targets)
        with autocast(self._training.precision):
            value = scalar_loss(self._loss(self._head(activations), targets))
        (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
        return float(value.detach())


class HostLeg:
    """Trains the host's blocks for one device: takes activations one micro-batch at a time, and returns their gradient."""

    def __init__(
        self,
        blocks: Blocks,
        part: Part,
        *,
        training: Training,
        loss: Loss,
        seed: int,
        num_samples: int,
        crossing: Boundary,
        answers: bool = True,
    ) -> None:
        """Set up the host's leg of one plan.

        Args:
            blocks: the whole model, in its initial state.
            part: the host's part: it runs all blocks behind the cut, and trains those of ``part.trained``.
            training: the plan's settings.
            loss: mean over the batch.
            seed: of the host's random numbers.
            num_samples: the device's training samples.
            crossing: shape and type of the activations.
            answers: whether gradients go back to the device.
        """
        self._blocks, self._training, self._loss, self._answers = blocks, training, loss, answers
        self._back = part.blocks
        self._stepper = Stepper(blocks.model, training=training, trainable=compile_part(part, blocks).trained)
        self._crossing = crossing
        self._schedule = micro_batch_schedule(num_samples, training)
        self._random = RandomStream(seed)
        self._next = next(self._schedule, None)
        self._value, self._batch = 0.0, 0  # loss and samples of the current batch so far
        self.steps = self.processed = 0
        self._total = self._total_square = 0.0

    @property
    def next(self) -> MicroBatch | None:
        """The micro-batch that is expected next; None after the last."""
        return self._next

    @property
    def between_steps(self) -> bool:
        """Whether no batch is half processed."""
        return not self._batch

    def micro_batch(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Process one micro-batch; after the last one of a batch, make one optimiser step.

        ``activations`` are float32, and so is their gradient, which is returned; both are in the memory format that they have
        inside the network. The gradient is zeros if none goes back to the device.
        """
        current = self._next
        assert current is not None
        assert len(activations) == current.samples
        entering = activations.to(self._crossing.dtype, copy=True).requires_grad_(self._answers)
        gradients: list[Tensor] = []
        if self._answers:
            # By a hook, since ``grad`` would have the memory format of ``entering`` instead of the gradient's own.
            entering.register_hook(gradients.append)  # type: ignore[no-untyped-call]  # of torch
        with self._random.active():
            with autocast(self._training.precision):
                value = scalar_loss(self._loss(self._blocks.run(self._back, entering), targets))
            if value.requires_grad:  # false if all host blocks are frozen and no gradient goes back
                (value * current.share if current.share != 1 else value).backward()  # type: ignore[no-untyped-call]
        self._value += current.share * float(value.detach())
        self._batch += current.samples
        if current.ends_batch:
            self._stepper.step()
            self.steps += 1
            self.processed += self._batch
            self._total += self._value * self._batch
            self._total_square += self._value**2 * self._batch
            self._value, self._batch = 0.0, 0
        self._next = next(self._schedule, None)
        return gradients[0].float() if gradients else torch.zeros_like(activations)

    def close(self) -> None:
        """Drop the gradients of an unfinished batch."""
        with self._stepper:
            pass

    @property
    def loss(self) -> float | None:
        """Mean loss per sample so far."""
        return self._total / self.processed if self.processed else None

    @property
    def loss_square(self) -> float | None:
        """Mean over the samples of their batch's squared loss."""
        return self._total_square / self.processed if self.processed else None
