"""What a user writes under ``data:``. Plain data; no torch here.

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
    """Shuffled and dealt out evenly."""


class Dirichlet(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dirichlet", tag_field="name"
):
    """Label proportions drawn from a Dirichlet distribution; the smaller ``alpha``, the more unequal.

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
    """Device i owns ``classes_per_device`` classes in a row, from the i-th on, round and round."""

    classes_per_device: Count


class Groups(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="groups", tag_field="name"):
    """Natural groups (such as writers) stay together: each belongs to one device."""


Partition = Iid | Dirichlet | Shards | CyclicClasses | Groups


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the samples come from and how they are dealt to the devices.

    ``name``: a built-in data set (``load.names()``) or the user's ``module:function``, called with ``num_devices``,
    ``seed``, ``root`` and ``kwargs``. ``root``: folder of the files; None means ``$FEDBONSAI_DATA``, else
    ``~/.cache/fedbonsai/data``. ``test_share``: part of each device's samples that is held out as its own test set.
    ``server_test``: false means that the server has no data at all. ``train_transforms``, ``test_transforms``: in order;
    empty means the data set's standard normalisation. ``public_share``: part of all training samples that no device gets,
    for pretraining; drawn by ``public_seed``, not by the run's seed, so that what was trained on it stays good for runs of
    other seeds. A smaller share is a part of a larger one. ``classes``: the class list of image folders; a class's place in
    it is its label.
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
        """The folder that ``root`` stands for on this machine."""
        default = os.environ.get("FEDBONSAI_DATA") or "~/.cache/fedbonsai/data"
        return Path(self.root or default).expanduser()
