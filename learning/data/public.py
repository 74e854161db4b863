"""The public set: samples that no device has, on which the server distils the devices' models.

It is the task's own public share (``data.public_share``), or another data set, whose labels are ignored. A part of it is held
out: the student is evaluated on it and not trained. A public sample that a device, or the server's test set, has too would
turn distillation into training on private data, or into training on the test: ``make_disjoint`` compares the contents.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ..seeds import derive
from .config import DataConfig
from .load import load, load_public
from .transforms import apply_checked
from .types import FederatedData, Indices, Samples, Transform

_MOST_SHARED = 0.01  # of the public set; in digits, MNIST and CIFAR-10 no two images are equal, but folders hold copies
_LEAST = 2  # samples in each part, since a model that normalises by the current batch needs two
_UNUSED = ("partition", "test_share", "public_share", "public_seed", "server_test", "train_transforms")


@dataclass(frozen=True, kw_only=True, eq=False)
class PublicSet:
    """Public samples, and their division into those to train on and those held out.

    Attributes:
        samples: in the form in which they are stored. Labels mean nothing unless ``labelled``.
        transform: converts a batch to the model's input, for teachers and student, in training too: the teachers' logits are
            computed once, so that the student must see the same inputs.
        labelled: whether the labels are classes of the task.
        train, held_out: positions in ``samples``, both ascending; each sample is in one of them.
        digest: hash of the samples and their division.
        dropped: number of samples that were removed because a device or the server's test set has them too.
    """

    samples: Samples
    transform: Transform
    labelled: bool
    train: Indices
    held_out: Indices
    digest: str
    dropped: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def num_bytes(self) -> int:
        """Size of the inputs as they are stored, and of the labels if they are used."""
        tensors = [self.samples.x, self.samples.y] if self.labelled else [self.samples.x]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def load_public_set(
    data: DataConfig,
    public: DataConfig | None,
    *,
    num_devices: int,
    seed: int,
    held_out: float,
    num_classes: int | None,
) -> PublicSet:
    """Load the public set: all training samples of ``public``, or with None the public share of ``data``.

    Args:
        data: the task's data, of ``num_devices`` devices.
        public: another data set (``server.public``).
        num_devices: of the fleet.
        seed: as for ``load``; also of the part that is held out.
        held_out: share of the samples (rounded) that is held out; at least two samples are in each part.
        num_classes: the task's; None if it is not classification.

    Raises:
        ValueError: if neither is configured, the files are missing, there are fewer than four samples, or inputs of the other
            data set have another shape or type than the task's.
    """
    if public is not None:
        source, samples = _other(data, public, num_devices=num_devices, seed=seed)
    elif data.public_share:
        source = load_public(data, num_devices=num_devices, seed=seed)
        samples = source.train(0)
    else:
        raise ValueError(
            "server.public is not set and data.public_share is 0; distillation on the server needs one of them: another data "
            "set, or a share of the samples that no device gets"
        )
    labels = samples.y.dim() == 1 and not samples.y.is_floating_point() and not samples.y.is_complex()
    train, tested = _divide(len(samples), held_out, seed=derive(seed, "held_out"))
    return PublicSet(
        samples=samples,
        transform=source.test_transform,
        labelled=public is None and num_classes is not None and labels,
        train=train,
        held_out=tested,
        digest=_digest(samples, tested),
    )


def make_disjoint(public: PublicSet, data: FederatedData) -> PublicSet:
    """Return the public set without the samples that ``data`` has too, in some device's shares or the server's test set.

    Two samples are the same if the bytes of their inputs are, as they are stored. A user's files may hold a few copies, so up
    to 1 % of the public set is dropped (``PublicSet.dropped``). Raises ``ValueError`` if more are shared.
    """
    kept = _not_in(public, data)
    dropped = len(kept) - int(kept.sum())
    if not dropped:
        return public
    if dropped > _MOST_SHARED * len(kept):
        raise ValueError(
            f"the public set (server.public, or data.public_share) has {len(kept)} samples, of which {dropped} are also on a "
            f"device or in the server's test set; at most {_MOST_SHARED:.0%} may be"
        )
    moved_to = np.cumsum(kept) - 1
    train, held_out = (moved_to[part[kept[part]]] for part in (public.train, public.held_out))
    _check_enough(len(train), len(held_out))
    samples = public.samples.take(np.flatnonzero(kept))
    return dataclasses.replace(
        public,
        samples=samples,
        train=train,
        held_out=held_out,
        digest=_digest(samples, held_out),
        dropped=public.dropped + dropped,
    )


def _other(data: DataConfig, public: DataConfig, *, num_devices: int, seed: int) -> tuple[FederatedData, Samples]:
    """Another data set and all its training samples. Raises ``ValueError`` that names ``server.public``."""
    if (public.name, public.root, public.kwargs) == (data.name, data.root, data.kwargs):
        raise ValueError(
            f"server.public.name is {public.name!r}, which is what the devices have; leave server.public out, and set "
            "data.public_share"
        )
    for field in _UNUSED:
        value = getattr(public, field)
        if value != getattr(DataConfig(), field):
            raise ValueError(
                f"server.public.{field} is {msgspec.to_builtins(value)!r}; leave it out: all training samples of another data "
                "set are public, without random transforms, and no others are used"
            )
    try:
        source = load(public, num_devices=1, seed=seed)
        samples = source.train(0)
    except ValueError as error:  # names data.root, data.name or another field of the section
        raise ValueError(f"server.public: {error}") from error
    own = load(data, num_devices=num_devices, seed=seed)
    ours, theirs = _input(own, field="data"), _input(source, field="server.public")
    if ours != theirs:
        raise ValueError(
            f"server.public.name is {public.name!r}, whose inputs have {theirs}, after transforms; the task's have {ours}"
        )
    return source, samples


def _input(data: FederatedData, *, field: str) -> str:
    """Shape and type of one transformed sample of the first device that has one."""
    device = next((device for device in range(data.num_devices) if data.num_samples(device)), None)
    if device is None:
        raise ValueError(f"{field}: there is not a single sample")
    x = data.train(device).take(np.arange(1)).x
    x = apply_checked(data.test_transform, x, field=f"{field}.test_transforms")
    return f"shape {list(x.shape[1:])} and type {str(x.dtype).removeprefix('torch.')}"


def _divide(count: int, held_out: float, *, seed: int) -> tuple[Indices, Indices]:
    """Positions to train on and positions held out."""
    number = min(max(int(count * held_out + 0.5), _LEAST), count - _LEAST)
    _check_enough(count - number, number)
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[number:]), np.sort(order[:number])


def _check_enough(*counts: int) -> None:
    """Raise ``ValueError`` if a part has too few samples."""
    if min(counts) < _LEAST:
        raise ValueError(
            f"the public set has {sum(counts)} samples; distillation needs {_LEAST} to train on, and {_LEAST} that are held out"
        )


def _digest(samples: Samples, held_out: Indices) -> str:
    """Hash of the samples and of the positions held out."""
    state = xxhash.xxh3_128(held_out.astype(np.int64).tobytes())
    for tensor in (samples.x, samples.y):
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(_rows(tensor).data)
    return state.hexdigest()


def _not_in(public: PublicSet, data: FederatedData) -> NDArray[np.bool_]:
    """Whether each public sample is in no share of ``data``."""
    keys = _keys(public.samples)
    wanted, shared = set(keys), set[bytes]()
    for private in _shares(data):
        if (private.x.dtype, private.x.shape[1:]) == (public.samples.x.dtype, public.samples.x.shape[1:]):
            shared.update(wanted.intersection(_keys(private)))
    return np.array([key not in shared for key in keys], dtype=bool)


def _shares(data: FederatedData) -> Iterator[Samples]:
    """All samples of the devices and of the server's test set."""
    for device in range(data.num_devices):
        if data.num_samples(device):
            yield data.train(device)
        if (test := data.test(device)) is not None:
            yield test
    if (test := data.server_test()) is not None:
        yield test


def _keys(samples: Samples) -> list[bytes]:
    """Hash of each sample's input. 60,000 images of MNIST take 0.03 s."""
    return [xxhash.xxh3_128_digest(row.data) for row in _rows(samples.x)]


def _rows(tensor: torch.Tensor) -> NDArray[Any]:
    """The bytes of each sample, ``[sample, byte]``."""
    rows = tensor.contiguous().reshape(len(tensor), -1) if tensor.numel() else tensor.new_zeros(len(tensor), 1)
    return rows.view(torch.uint8).numpy()
