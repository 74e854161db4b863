"""The stream between the two legs of a split plan: numbered packets of activations and labels up, of gradients down.

Both ends derive the contents of a packet from plan, workload and packet number: shapes and sample counts never come from a
header. Only the memory format does, since it depends on the sender's processor.
"""

from collections import deque

import msgspec
import torch
from torch import Tensor

from ...comms.codec import Array, ArraySpec, Codec, Context
from ...comms.codecs.make_codec import make_codec
from ...comms.errors import MismatchedPacket
from ...comms.packet import PacketKind, Stamp, read_stamp, seal, unseal
from ...learning.seeds import derive
from ...learning.spec import Call
from ...learning.tensors import as_arrays, as_tensors, axis_order, in_axis_order, numpy_name
from ...learning.workload import Workload
from ...policies.plan import Plan
from .host_messages import HostLink

ACTIVATIONS, TARGETS, GRADIENT = "activations", "targets", "gradient"


class Labels:
    """The encoding of one workload's targets: labels of few classes take one byte or two, all other targets keep their type.

    As bytes they are symbols, so the codec chain's entropy coder takes them together with the activations.

    ``shape``: of one target; ``dtype``: numpy's name of the encoded type.
    """

    def __init__(self, example: Tensor, num_classes: int | None, loss: Call | None = None) -> None:
        """``num_classes``: None if targets are no labels. ``loss``: its ``ignore_index`` must fit into the type, too."""
        self.shape, self._type = tuple(example.shape), example.dtype
        self._encoded_type = example.dtype
        if example.dtype == torch.int64 and num_classes is not None:
            # Signed, for the negative labels that a loss ignores; torch's default is -100.
            largest = max(num_classes - 1, int(loss.kwargs.get("ignore_index", 0)) if loss is not None else 0)
            fitting = (dtype for dtype in (torch.int8, torch.int16) if largest <= torch.iinfo(dtype).max)
            self._encoded_type = next(fitting, self._encoded_type)
        self.dtype = numpy_name(self._encoded_type)

    def encode(self, targets: Tensor) -> Tensor:
        """Targets in the type that is sent; raises ``ValueError`` for labels that it cannot hold."""
        if self._encoded_type != self._type and targets.numel():
            limits, low, high = torch.iinfo(self._encoded_type), int(targets.min()), int(targets.max())
            if not limits.min <= low <= high <= limits.max:
                raise ValueError(
                    f"targets hold labels from {low} to {high}; for so few classes they are sent as numbers from "
                    f"{limits.min} to {limits.max}"
                )
        return targets.to(self._encoded_type)

    def decode(self, encoded: Tensor) -> Tensor:
        """Targets in the type that the loss takes."""
        return encoded.to(self._type)


class ActivationStream:
    """Seals and opens the packets of one plan's stream."""

    def __init__(self, plan: Plan, workload: Workload) -> None:
        """``plan.part``: the device's blocks."""
        assert plan.split is not None
        _, target = workload.example()
        self.crossing = workload.architecture(plan.part).boundary(plan.part.blocks, plan.training)
        self._plan = plan
        self._labels = Labels(target, workload.data.num_classes, plan.training.loss)
        self._up, self._down = make_codec(plan.split.codec_up), make_codec(plan.split.codec_down)

    def seal_activations(self, number: int, activations: Tensor, targets: Tensor) -> Array:
        """The packet of one micro-batch: activations and targets."""
        values = {ACTIVATIONS: _channels_first(activations), TARGETS: self._labels.encode(targets)}
        stamp = self._stamp(number, PacketKind.ACTIVATIONS, axes=axis_order(activations))
        return self._seal(values, self._up, self._activations(len(activations)), stamp)

    def open_activations(
        self, number: int, packet: Array, samples: int, *, of_this_plan: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Activations and targets; raises a ``PacketError``. ``of_this_plan`` False: a view that an earlier plan uploaded."""
        sent_stamp = read_stamp(packet)
        stamp = self._stamp(number, PacketKind.ACTIVATIONS, axes=sent_stamp.axes)
        if not of_this_plan:
            stamp = msgspec.structs.replace(sent_stamp, kind=stamp.kind, sequence=number)
        opened = self._open(packet, self._up, self._activations(samples), stamp)
        return _samples_first(opened[ACTIVATIONS], sent_stamp.axes), self._labels.decode(opened[TARGETS])

    def seal_gradient(self, number: int, gradient: Tensor) -> Array:
        """The packet that answers one micro-batch."""
        stamp = self._stamp(number, PacketKind.GRADIENTS, axes=axis_order(gradient))
        return self._seal({GRADIENT: _channels_first(gradient)}, self._down, self._gradient(len(gradient)), stamp)

    def open_gradient(self, number: int, packet: Array, samples: int) -> Tensor:
        """The gradient of one micro-batch's activations; raises a ``PacketError``."""
        stamp = self._stamp(number, PacketKind.GRADIENTS, axes=read_stamp(packet).axes)
        return _samples_first(self._open(packet, self._down, self._gradient(samples), stamp)[GRADIENT], stamp.axes)

    def packets(self, samples: int) -> tuple[tuple[ArraySpec, ...], tuple[ArraySpec, ...]]:
        """The arrays in a micro-batch's packet, and in its answer, before their codecs."""
        return self._activations(samples), self._gradient(samples)

    def _activations(self, samples: int) -> tuple[ArraySpec, ...]:
        return (
            ArraySpec(ACTIVATIONS, self._shape(samples), "<f4", role="activation"),
            ArraySpec(TARGETS, (samples, *self._labels.shape), self._labels.dtype, role="target"),
        )

    def _gradient(self, samples: int) -> tuple[ArraySpec, ...]:
        return (ArraySpec(GRADIENT, self._shape(samples), "<f4", role="activation"),)

    def _shape(self, samples: int) -> tuple[int, ...]:
        """Of the activations as they are sent: channels first, since codecs adapt to the first dimension."""
        shape = self.crossing.shape
        return (shape[0], samples, *shape[1:]) if len(shape) > 1 else (samples, *shape)

    def _seal(self, values: dict[str, Tensor], codec: Codec, specs: tuple[ArraySpec, ...], stamp: Stamp) -> Array:
        packet, _ = seal(as_arrays(values), codec=codec, context=self._context(stamp.sequence, specs), stamp=stamp)
        return packet

    def _open(self, packet: Array, codec: Codec, specs: tuple[ArraySpec, ...], stamp: Stamp) -> dict[str, Tensor]:
        context = self._context(stamp.sequence, specs)
        return as_tensors(unseal(packet, codec=codec, expected=specs, context=context, stamp=stamp, finite=True))

    def _context(self, number: int, specs: tuple[ArraySpec, ...]) -> Context:
        return Context(seed=derive(self._plan.seed, "stream", number), roles={spec.name: spec.role for spec in specs})

    def _stamp(self, number: int, kind: PacketKind, *, axes: int) -> Stamp:
        plan = self._plan
        return Stamp(kind=kind, version=plan.version, plan=plan.id, attempt=plan.attempt, sequence=number, axes=axes)


def _channels_first(tensor: Tensor) -> Tensor:
    """A contiguous tensor with channels before samples, if it has channels."""
    return (tensor.transpose(0, 1) if tensor.dim() > 2 else tensor).contiguous()


def _samples_first(received: Tensor, axes: int) -> Tensor:
    """The inverse, in the sender's memory format. Raises ``MismatchedPacket`` if ``axes`` names none."""
    try:
        return in_axis_order(received.transpose(0, 1) if received.dim() > 2 else received, axes)
    except ValueError as error:
        raise MismatchedPacket(str(error)) from error


class DeviceStream:
    """The device's end of a stream: sends within the plan's window, and receives gradients where the method returns them."""

    def __init__(self, plan: Plan, host: HostLink, workload: Workload) -> None:
        """The stream starts at packet 0."""
        assert plan.split is not None
        self._stream, self._host, self._window = ActivationStream(plan, workload), host, plan.split.window
        self._number, self._expects_gradients = 0, plan.split.method.returns_gradients
        self._sent: deque[tuple[int, int]] = deque()  # number and samples of unanswered packets

    def send(self, activations: Tensor, targets: Tensor) -> None:
        """Send one micro-batch."""
        self._host.send(self._stream.seal_activations(self._number, activations, targets), window=self._window)
        if self._expects_gradients:
            self._sent.append((self._number, len(activations)))
        self._number += 1

    def receive(self) -> Tensor:
        """Wait for the gradient of the oldest unanswered activations."""
        number, samples = self._sent.popleft()
        return self._stream.open_gradient(number, self._host.answer(), samples)

    def exchange(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Send one micro-batch and wait for its gradient."""
        self.send(activations, targets)
        return self.receive()
