"""Settings from which server and devices build the same workload, as they are sent to workers. Imports no torch."""

from pathlib import Path
from typing import Literal

import msgspec

from .data.config import DataConfig
from .spec import Call, KernelTable, Sparsity, Training

TORCHVISION = "torchvision"


class Initialisation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``init`` section of the configuration: the source of the model's initial weights.

    The modes:

        random     all tensors from the seed
        partial    the blocks up to ``trunk`` from the file, the others from the seed
        holistic   all tensors from the file, except a classifier with another number of classes, which comes from the seed

    EcoFed (Wu et al., IEEE TPDS 35(3), 2024, arXiv 2304.05495) freezes a trunk of the second kind. All methods may use all
    modes, so that comparisons are fair. Running statistics belong to the weights. Unlike the paper's third mode, a classifier
    of equal shape is copied too: the task is then the same.

    ``weights``: a safetensors file, or "torchvision" for the published weights of a model ``torchvision/NAME``. ``trunk``: the
    last block that the mode partial copies (None: the first). ``hash``: required ``model_hash`` of the weights (None: any).
    ``missing``: "keep" leaves tensors that the weights lack at their initial values, such as adapters on a pretrained base;
    "refuse" raises for the first one. Raises ``ValueError`` for settings that the mode does not use, or that it lacks.
    ``learning.pretrained`` reads the weights.
    """

    mode: Literal["random", "partial", "holistic"] = "random"
    weights: str | None = None
    trunk: str | None = None
    hash: str | None = None
    missing: Literal["refuse", "keep"] = "refuse"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for settings that would be ignored."""
        if self.mode != "random" and self.weights is None:
            raise ValueError(
                f"init.mode is {self.mode!r}, which needs init.weights: a safetensors file, or {TORCHVISION!r}"
            )
        for name in ("weights", "trunk", "hash"):
            value = getattr(self, name)
            if self.mode == "random" and value is not None:
                raise ValueError(f"init.{name} is {value!r}, but init.mode is 'random'; use 'partial' or 'holistic'")
        if self.mode == "random" and self.missing == "keep":
            raise ValueError("init.missing is 'keep', but init.mode is 'random'; use 'partial' or 'holistic'")
        if self.mode == "holistic" and self.trunk is not None:
            raise ValueError(f"init.trunk is {self.trunk!r}, which is for the mode 'partial'; init.mode is 'holistic'")

    @property
    def file(self) -> Path | None:
        """The path of the weights; None unless they come from a file."""
        return None if self.weights in (None, TORCHVISION) else Path(str(self.weights)).expanduser()


class WorkloadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that server and devices share.

    ``metrics``: None means the defaults for ``loss``, the experiment's, and its targets (``losses.default_metrics``).
    ``batch_statistics``: batch normalisation always uses the statistics of the current batch. ``init``: with the hash of its
    weights (``pretrained.with_weights_hash``), so that all processes use the same ones. ``models``: the families of models by
    name, beside the global ``model``. ``public``: the public set (None: the public share of ``data``). ``sparsity``: of all
    models in evaluation, and in training that names no other (None: dense). ``kernels``: of their products. ``threads``:
    torch threads of each process.
    """

    model: Call
    data: DataConfig
    metrics: tuple[Call, ...] | None
    num_devices: int
    seed: int
    loss: Call = Training().loss
    batch_statistics: bool = False
    init: Initialisation = Initialisation()
    models: dict[str, Call] = {}
    public: DataConfig | None = None
    sparsity: Sparsity | None = None
    kernels: KernelTable = {}
    threads: int = 1
