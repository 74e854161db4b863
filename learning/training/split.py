"""Split training: one network in two legs, the device's first blocks and the host's others, joined by what crosses the cut.

    device                                   host
    z = front(x)        z, y  ------------>  loss(back(z), y)
    front's gradient  <------------  dloss/dz, and the gradient of its own blocks

SplitFed's first version (Thapa et al., AAAI 2022, arXiv 2004.12088): one copy of the host's blocks for each device, both legs
with an optimiser of their own. Each does to its blocks, bit for bit, what training of the whole model does; so with gradients
that come back before the next batch (window 1) both together are FedAvg. That holds in float32 and under bf16 autocast, in any
memory format and on any processor, as long as both legs run on processors of one kind: what crosses the cut keeps the memory
format that it had (``memory_format``).

Random numbers (dropout) that are drawn on one side of the cut only are those of the whole model too; where both sides draw,
the host's come from the same seed, but are others than a whole model's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import batches, micro_batches, until
from ..data.types import Samples, Transform
from ..parts.blocks import Blocks
from ..parts.part import trained_tensors
from ..randomness import RandomStream, undisturbed
from ..spec import Training
from .losses import Loss, scalar_loss
from .training import Stepper, autocast, laid_out

Exchange = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What both legs know of a micro-batch before it is there: samples, share of its batch, and whether it ends that."""

    samples: int
    share: float
    ends_batch: bool


def schedule(num_samples: int, training: Training) -> Iterator[MicroBatch]:
    """The micro-batches of one plan, in order: sizes do not depend on the seed."""
    for indices in batches(
        num_samples, batch_size=training.batch_size, epochs=training.epochs, steps=training.steps, seed=0
    ):
        parts = list(micro_batches(indices, batch_size=training.batch_size, accumulation=training.accumulation))
        for number, (part, share) in enumerate(parts, 1):
            yield MicroBatch(len(part), share, number == len(parts))


def walk(
    samples: Samples, training: Training, *, seed: int, over: Callable[[], bool] | None = None
) -> Iterator[tuple[Samples, int]]:
    """The micro-batches of a device in the order of ``train``, each with the samples of the batch that it ends, or 0.

    ``over``: asked before each batch but the first whether to stop early.
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
    """What crosses a cut, for each sample: its shape, and its type inside the network (bfloat16 under autocast, perhaps)."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def boundary(blocks: Blocks, front: tuple[str, ...], *, example: Tensor, training: Training) -> Boundary:
    """Shape and type of what leaves the last of the ``front`` blocks, for inputs like ``example``, of which two are run.

    Raises ``ValueError`` when that is not one tensor of floating point with a batch dimension.
    """
    with undisturbed(), torch.no_grad(), autocast(training):
        x = example.unsqueeze(0).expand(2, *example.shape).contiguous()
        for name in front:
            block = blocks.modules[name]
            buffers = {key: buffer.clone() for key, buffer in block.named_buffers()}  # the model is left as it is
            x = torch.func.functional_call(block, buffers, (x,))
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1 or x.shape[0] != 2:
        raise ValueError(f"what leaves block {front[-1]!r} is no tensor of floating point with a batch dimension")
    return Boundary(tuple(x.shape[1:]), x.dtype)


class DeviceLeg:
    """Gradients of a device's blocks by way of the host: for ``train``, in place of a whole model's."""

    def __init__(self, blocks: Blocks, front: tuple[str, ...], *, training: Training, exchange: Exchange) -> None:
        """``exchange``: sends activations (float32) and targets, and gives back the gradient of the former (float32).

        Both are in the memory format that they have inside the network.
        """
        self._blocks, self._front, self._training, self._exchange = blocks, front, training, exchange

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """One micro-batch. The loss is the host's to report; here it is 0."""
        with autocast(self._training):
            activations = self._blocks.run(self._front, laid_out(inputs, self._training))
        gradient = self._exchange(activations.detach().float(), targets)
        if activations.requires_grad:  # a front may be frozen as a whole
            activations.backward(returned(gradient, activations))
        return 0.0


def returned(gradient: Tensor, activations: Tensor) -> Tensor:
    """The gradient of ``activations`` that came back, in their type: a copy, since autograd may keep what it is given."""
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
    """A frozen front's part of training: what leaves it, micro-batch by micro-batch, in the order that ``train`` takes.

    It runs in evaluation mode, so that what leaves it depends on the sample and the transform alone, whatever the batch.
    """
    for name in front:
        blocks.modules[name].eval()
    generator = torch.Generator().manual_seed(seed)
    for batch, _ in walk(samples, training, seed=seed):
        with torch.no_grad(), autocast(training):
            activations = blocks.run(front, laid_out(transform(batch.x, generator), training))
        send(activations.float(), batch.y)


class LocalLeg:
    """Gradients of a device's blocks by a loss of their own, through an auxiliary head: for ``train``, as ``DeviceLeg``.

    What leaves the blocks goes to the host as well, before they are trained on it, and nothing comes back.
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
        """``send``: takes activations (float32) and targets."""
        self._blocks, self._front, self._head = blocks, front, head
        self._training, self._loss, self._send = training, loss, send

    def __call__(self, inputs: Tensor, targets: Tensor, share: float) -> float:
        """One micro-batch; the local loss."""
        with autocast(self._training):
            activations = self._blocks.run(self._front, laid_out(inputs, self._training))
        self._send(activations.detach().float(), targets)
        with autocast(self._training):
            value = scalar_loss(self._loss(self._head(activations), targets))
        (value * share if share != 1 else value).backward()  # type: ignore[no-untyped-call]
        return float(value.detach())


class HostLeg:
    """The host's blocks for one device: batch by batch as its activations come, the gradient of which goes back."""

    def __init__(
        self,
        blocks: Blocks,
        front: tuple[str, ...],
        *,
        training: Training,
        loss: Loss,
        seed: int,
        num_samples: int,
        crossing: Boundary,
        frozen: tuple[str, ...] = (),
        answers: bool = True,
    ) -> None:
        """``blocks``: in the state to start from. ``front``: the blocks that are the device's. ``crossing``: see there.

        ``frozen``: those of the others that are not trained. ``answers``: whether gradients go back.
        """
        self._blocks, self._training, self._loss, self._answers = blocks, training, loss, answers
        self._back = tuple(name for name in blocks.spec.block_names if name not in front)
        names = [
            tensor.name for tensor in trained_tensors(blocks.spec, tuple(n for n in self._back if n not in frozen))
        ]
        self._stepper = Stepper(blocks.model, training=training, trainable=names)
        self._crossing = crossing
        self._coming = schedule(num_samples, training)
        self._random = RandomStream(seed)
        self._next = next(self._coming, None)
        self._value, self._batch = 0.0, 0  # of the batch that is under way
        self.steps = self.processed = 0
        self._total = self._total_square = 0.0

    @property
    def next(self) -> MicroBatch | None:
        """The micro-batch that must come now; None after the last."""
        return self._next

    @property
    def between_steps(self) -> bool:
        """Whether no batch is under way."""
        return not self._batch

    def micro_batch(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Take one: the gradient (float32) of its activations (float32); after the last of a batch, one optimiser step.

        ``activations`` come, and their gradient goes, in the memory format that it has inside the network. Where no gradient
        goes back, it is zeros.
        """
        now = self._next
        assert now is not None
        assert len(activations) == now.samples
        entering = activations.to(self._crossing.dtype, copy=True).requires_grad_(self._answers)
        gradients: list[Tensor] = []
        if self._answers:
            # A hook, since ``grad`` takes the memory format of ``entering``, whatever that of the gradient was.
            entering.register_hook(gradients.append)  # type: ignore[no-untyped-call]  # of torch
        with self._random.drawn():
            with autocast(self._training):
                value = scalar_loss(self._loss(self._blocks.run(self._back, entering), targets))
            if (
                value.requires_grad
            ):  # of blocks that are frozen as a whole, for a device that waits for no gradient, nothing
                (value * now.share if now.share != 1 else value).backward()  # type: ignore[no-untyped-call]
        self._value += now.share * float(value.detach())
        self._batch += now.samples
        if now.ends_batch:
            self._stepper.step()
            self.steps += 1
            self.processed += self._batch
            self._total += self._value * self._batch
            self._total_square += self._value**2 * self._batch
            self._value, self._batch = 0.0, 0
        self._next = next(self._coming, None)
        return gradients[0].float() if gradients else torch.zeros_like(activations)

    def close(self) -> None:
        """Give up what is under way: no gradient stays behind."""
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
