"""The ``data`` section of the configuration, as plain data. Imports no torch.

::

    data:
      name: cifar10
      root: /srv/data
      partition: {name: dirichlet, alpha: 0.5}
      test_share: 0.2
      train_transforms: [{name: random_crop, kwargs: {padding: 4}}, {name: random_flip}, {name: normalize}]
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ..spec import Call, Count, CountOrZero, Positive


class Iid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="iid", tag_field="name"):
    """Shuffled, and distributed evenly."""


class Dirichlet(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dirichlet", tag_field="name"
):
    """Label proportions drawn from a Dirichlet distribution; a smaller ``alpha`` makes devices more unequal.

    ``sizes``: "free" lets the number of samples vary with them, "equal" keeps it the same on every device.
    """

    alpha: Positive
    sizes: Literal["free", "equal"] = "free"
    min_samples: Count = 1


class Shards(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shards", tag_field="name"):
    """Sorted by label, cut into shards, ``shards_per_device`` to each device."""

    shards_per_device: Count = 2


class CyclicClasses(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="classes", tag_field="name"
):
    """Device i owns ``classes_per_device`` consecutive classes, starting at the i-th, cyclically."""

    classes_per_device: Count


class Groups(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="groups", tag_field="name"):
    """Each natural group of samples (such as those of one writer) belongs to one device."""


Partition = Iid | Dirichlet | Shards | CyclicClasses | Groups


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Source of the samples, and their partition over the devices.

    Attributes:
        name: a built-in data set (``load.names()``) or the user's ``module:function``, called with ``num_devices``, ``seed``,
            ``root`` and ``kwargs``.
        root: folder of the files; None means ``$FEDBONSAI_DATA``, or ``~/.cache/fedbonsai/data`` if that is not set.
        test_share: share of each device's samples that is held out as its own test set.
        public_share: share of all training samples that no device gets, for pretraining. A smaller share is contained in a
            larger one.
        public_seed: seed of the public share. It is not the run's seed, so that weights trained on the public share can be used
            in runs of other seeds.
        server_test: false means that the server has no data at all.
        train_transforms, test_transforms: in order; empty means the data set's standard normalisation.
        classes: the class list of image folders; the index of a class in it is its label.
    """

    name: str = "digits"
    kwargs: dict[str, Any] = {}
    root: str | None = None
    download: bool = False
    partition: Partition = Iid()
    test_share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    public_share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    public_seed: CountOrZero = 0
    server_test: bool = True
    train_transforms: tuple[Call, ...] = ()
    test_transforms: tuple[Call, ...] = ()
    classes: tuple[str, ...] | None = None

    @property
    def folder(self) -> Path:
        """The folder that ``root`` refers to on this machine."""
        default = os.environ.get("FEDBONSAI_DATA") or "~/.cache/fedbonsai/data"
        return Path(self.root or default).expanduser()
