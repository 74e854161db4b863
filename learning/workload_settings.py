"""What server and devices build their workload from, as it travels between them. Imports no torch."""

import msgspec

from .data.config import DataConfig
from .initialisation import Initialisation
from .spec import Call, Training


class WorkloadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that server and devices share. ``batch_statistics``: normalise by the batch at hand, always.

    ``metrics``: None means those that follow from ``loss``, the experiment's, and its targets (``losses.default_metrics``).
    ``init``: with the hash of its weights (``pretrained.pinned``), so that all read the same ones.
    """

    model: Call
    data: DataConfig
    metrics: tuple[Call, ...] | None
    num_devices: int
    seed: int
    loss: Call = Training().loss
    batch_statistics: bool = False
    init: Initialisation = Initialisation()
