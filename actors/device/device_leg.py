"""The device's leg of a split plan: training its blocks with a host, or uploading what leaves them."""

from collections.abc import Callable

from ...comms.errors import MismatchedPacket
from ...learning.data.types import Samples
from ...learning.training.ahead import train_ahead
from ...learning.training.losses import make_loss
from ...learning.training.split import DeviceLeg, LocalLeg, forward_only
from ...learning.training.training import Gradient, TrainingResult, train
from ...learning.workload import Workload
from ...policies.plan import Plan
from ..messages.host_messages import HostLink
from ..messages.stream import DeviceStream
from .module import Module


def train_front(
    plan: Plan,
    module: Module,
    samples: Samples,
    host: HostLink | None,
    workload: Workload,
    *,
    over: Callable[[], bool] | None,
) -> TrainingResult:
    """Train the device's blocks, with gradients from the host or by a local loss.

    With a window above 1 and gradients from the host, forward passes run ahead of them. ``over``: whether to stop early.
    """
    if host is None or plan.split is None:
        raise MismatchedPacket(f"plan {plan.id} is split, and has no connection to a host")
    stream, front = DeviceStream(plan, host, workload), plan.part.blocks
    transform = workload.data.train_transform
    trainable = workload.submodel(plan.part).trained
    if plan.split.window > 1 and not plan.part.head:
        return train_ahead(
            module.blocks,
            front,
            samples,
            training=plan.training,
            transform=transform,
            seed=plan.seed,
            trainable=trainable,
            window=plan.split.window,
            send=stream.send,
            receive=stream.receive,
            over=over,
        )
    result = train(
        module.model,
        samples,
        training=plan.training,
        loss=make_loss(plan.training.loss),
        transform=transform,
        seed=plan.seed,
        trainable=trainable,
        gradient=_gradient(plan, module, stream),
        auxiliaries=[module.auxiliary(name) for name in plan.part.auxiliaries],
        over=over,
    )
    host.flush()
    return result


def _gradient(plan: Plan, module: Module, stream: DeviceStream) -> Gradient:
    """The gradients of the device's blocks, one micro-batch at a time: by a local loss, or from the host."""
    if plan.part.head:
        return LocalLeg(
            module.blocks,
            plan.part.blocks,
            module.auxiliary(plan.part.head),
            training=plan.training,
            loss=make_loss(plan.training.loss),
            send=stream.send,
        )
    return DeviceLeg(module.blocks, plan.part.blocks, training=plan.training, exchange=stream.exchange)


def upload(plan: Plan, module: Module, samples: Samples, host: HostLink | None, workload: Workload) -> None:
    """Run the frozen blocks forward and send their activations to the host, which sends nothing back."""
    if host is None:
        raise MismatchedPacket(f"plan {plan.id} is split, and has no connection to a host")
    stream = DeviceStream(plan, host, workload)
    forward_only(
        module.blocks,
        plan.part.blocks,
        samples,
        training=plan.training,
        transform=workload.data.train_transform,
        seed=plan.seed,
        send=stream.send,
    )
    host.flush()
