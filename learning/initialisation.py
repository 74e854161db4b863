"""Where a model's first weights come from: the seed, or (partly) a file of weights that were trained on public data.

    random     all tensors from the seed
    partial    the blocks up to ``trunk`` from the file, the others from the seed
    holistic   everything from the file, but a classifier of another number of classes from the seed

EcoFed (Wu et al., IEEE TPDS 35(3), 2024, arXiv 2304.05495) freezes a trunk of the second kind. The modes are open to every
method, so that comparisons are fair. Running statistics belong to the weights. We depart from the paper's third mode in that
a classifier whose shapes agree is taken over too: it is the same task then.

This module holds the settings, and imports no torch; ``pretrained`` reads such a file.
"""

from pathlib import Path
from typing import Literal

import msgspec

TORCHVISION = "torchvision"


class Initialisation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a user writes under ``init:``.

    ``weights``: a safetensors file, or "torchvision" for the published weights of a model ``torchvision/NAME``. ``trunk``: the
    last block that is taken over by the mode partial (None: the first). ``hash``: what ``model_hash`` of the weights must be
    (None: anything). ``missing``: "keep" leaves tensors that the weights lack as they are built, such as adapters on a
    pretrained base; "refuse" names the first. Raises ``ValueError`` for settings that the mode does not use, or lacks.
    """

    mode: Literal["random", "partial", "holistic"] = "random"
    weights: str | None = None
    trunk: str | None = None
    hash: str | None = None
    missing: Literal["refuse", "keep"] = "refuse"

    def __post_init__(self) -> None:
        """Refuse weights that would be ignored without a word."""
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
        """The file of the weights, if that is where they come from."""
        return None if self.weights in (None, TORCHVISION) else Path(str(self.weights)).expanduser()
