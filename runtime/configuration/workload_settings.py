"""What of a configuration server and devices build their workload from."""

from ...learning.workload_settings import WorkloadSettings
from .config import Config


def workload_settings(config: Config, *, num_devices: int) -> WorkloadSettings:
    """What server and devices build their workload from; raises ``ValueError`` for initial weights that cannot be read."""
    init = config.init
    if init.mode != "random":
        from ...learning.pretrained import pinned  # only here, since it imports torch

        init = pinned(init, model=config.model.name)
    return WorkloadSettings(
        model=config.model,
        data=config.data,
        metrics=config.evaluation.metrics,
        loss=config.training.loss,
        num_devices=num_devices,
        seed=config.seed,
        batch_statistics=config.server.statistics == "batch",
        init=init,
    )
