"""The stream between the two legs of a split plan: numbered packets of activations up, of gradients down.

What a packet holds follows from the plan, the workload and the number within the stream, at both ends: shapes and sample
counts never come from a header. Only the memory format does, which the receiver cannot know: it depends on the sender's
processor.
"""

from collections import deque

import msgspec
from torch import Tensor

from ...comms.codec import Array, ArraySpec, Codec, Context
from ...comms.codecs.make_codec import make_codec
from ...comms.errors import MismatchedPacket
from ...comms.packet import PacketKind, Stamp, read_stamp, seal, unseal
from ...learning.seeds import derive
from ...learning.tensors import as_arrays, as_tensors, axis_order, in_axis_order
from ...learning.workload import Workload
from ...policies.plan import Plan
from .host_link import HostLink
from .labels import Labels

ACTIVATIONS, TARGETS, GRADIENT = "activations", "targets", "gradient"


class ActivationStream:
    """What both ends of a stream know of its packets."""

    def __init__(self, plan: Plan, workload: Workload) -> None:
        """``plan.part`` are the device's blocks."""
        assert plan.split is not None
        _, target = workload.example()
        self.crossing = workload.boundary(plan.part.blocks, plan.training)
        self._plan = plan
        self._labels = Labels(target, workload.data.num_classes, plan.training.loss)
        self._up, self._down = make_codec(plan.split.codec_up), make_codec(plan.split.codec_down)

    def seal_activations(self, number: int, activations: Tensor, targets: Tensor) -> Array:
        """The packet of one micro-batch."""
        values = {ACTIVATIONS: _inward(activations), TARGETS: self._labels.narrowed(targets)}
        stamp = self._stamp(number, PacketKind.ACTIVATIONS, axes=axis_order(activations))
        return self._seal(values, self._up, self._activations(len(activations)), stamp)

    def open_activations(
        self, number: int, packet: Array, samples: int, *, of_this_plan: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Activations and targets; raises a ``PacketError``. ``of_this_plan`` False: of a view that another plan uploaded."""
        found = read_stamp(packet)
        stamp = self._stamp(number, PacketKind.ACTIVATIONS, axes=found.axes)
        if not of_this_plan:
            stamp = msgspec.structs.replace(found, kind=stamp.kind, sequence=number)
        opened = self._open(packet, self._up, self._activations(samples), stamp)
        return _outward(opened[ACTIVATIONS], found.axes), self._labels.widened(opened[TARGETS])

    def seal_gradient(self, number: int, gradient: Tensor) -> Array:
        """The packet that answers one micro-batch."""
        stamp = self._stamp(number, PacketKind.GRADIENTS, axes=axis_order(gradient))
        return self._seal({GRADIENT: _inward(gradient)}, self._down, self._gradient(len(gradient)), stamp)

    def open_gradient(self, number: int, packet: Array, samples: int) -> Tensor:
        """The gradient; raises a ``PacketError``."""
        stamp = self._stamp(number, PacketKind.GRADIENTS, axes=read_stamp(packet).axes)
        return _outward(self._open(packet, self._down, self._gradient(samples), stamp)[GRADIENT], stamp.axes)

    def packets(self, samples: int) -> tuple[tuple[ArraySpec, ...], tuple[ArraySpec, ...]]:
        """What a micro-batch's packet holds, and its answer, before their codecs."""
        return self._activations(samples), self._gradient(samples)

    def _activations(self, samples: int) -> tuple[ArraySpec, ...]:
        return (
            ArraySpec(ACTIVATIONS, self._shape(samples), "<f4", role="activation"),
            ArraySpec(TARGETS, (samples, *self._labels.shape), self._labels.dtype, role="target"),
        )

    def _gradient(self, samples: int) -> tuple[ArraySpec, ...]:
        return (ArraySpec(GRADIENT, self._shape(samples), "<f4", role="activation"),)

    def _shape(self, samples: int) -> tuple[int, ...]:
        """Of what crosses, as it travels: channels first, since codecs adapt to the first dimension."""
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


def _inward(tensor: Tensor) -> Tensor:
    """As it travels: channels first where there are any."""
    return (tensor.transpose(0, 1) if tensor.dim() > 2 else tensor).contiguous()


def _outward(arrived: Tensor, axes: int) -> Tensor:
    """Samples first again, in the sender's memory format. Raises ``MismatchedPacket`` for one that is none."""
    try:
        return in_axis_order(arrived.transpose(0, 1) if arrived.dim() > 2 else arrived, axes)
    except ValueError as error:
        raise MismatchedPacket(str(error)) from error


class DeviceStream:
    """The device's end: packets out as the window allows, and in, where gradients come back."""

    def __init__(self, plan: Plan, host: HostLink, workload: Workload) -> None:
        """At the first packet."""
        assert plan.split is not None
        self._stream, self._host, self._window = ActivationStream(plan, workload), host, plan.split.window
        self._number, self._answered = 0, plan.split.method.returns_gradients
        self._sent: deque[tuple[int, int]] = deque()  # number and samples of packets whose answers are to come

    def send(self, activations: Tensor, targets: Tensor) -> None:
        """Activations there."""
        self._host.send(self._stream.seal_activations(self._number, activations, targets), window=self._window)
        if self._answered:
            self._sent.append((self._number, len(activations)))
        self._number += 1

    def receive(self) -> Tensor:
        """The gradient of the oldest activations that have none yet."""
        number, samples = self._sent.popleft()
        return self._stream.open_gradient(number, self._host.answer(), samples)

    def exchange(self, activations: Tensor, targets: Tensor) -> Tensor:
        """Activations there, their gradient back."""
        self.send(activations, targets)
        return self.receive()
