"""The device's leg of a split plan: what its blocks need a host for."""

from ..learning.data.types import Samples
from ..learning.losses import make_loss
from ..learning.split import DeviceLeg, LocalLeg, forward_only
from ..learning.training import Gradient
from ..learning.workload import Workload
from ..policies.plan import Plan
from .module import Module
from .stream import DeviceStream, HostLink


def leg(plan: Plan, module: Module, host: HostLink | None, workload: Workload) -> Gradient:
    """How the gradients of the device's blocks come about: by way of the host, or by a loss of their own."""
    assert host is not None, "a split plan came without a host"
    stream = DeviceStream(plan, host, workload)
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
    """What leaves the frozen front, to the host; nothing comes back."""
    assert host is not None, "a split plan came without a host"
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
