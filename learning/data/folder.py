"""Image folders: ``<root>/<device>/<class>/*.png``, or one pool ``<root>/<class>/*.png`` that is then partitioned.

The class list of the experiment (``data.classes``) defines the labels, so a device that lacks the first class uses the same
label ids. ``<root>/test/<class>/`` holds the server's test images, if there are any. Images that cannot be decoded are skipped
and counted. Grey images of 16 bits keep their depth: if there is one, all images are floats on the scale 0..1.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from ..spec import Count
from .cache import Arrays, ArraySamples, cached
from .config import DataConfig
from .types import SamplePool

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow's readers raise


class FolderOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keyword arguments of the data set ``folder``.

    Images are scaled to ``image_size`` pixels a side, in colour (3 ``channels``) or grey (1). ``devices``: the folder of
    each device, in order; None means all folders except ``test``, in natural order (2 before 10).
    """

    image_size: Count = 32
    channels: Literal[1, 3] = 3
    devices: tuple[str, ...] | None = None


_MAX_16_BITS = 65535


class _UnknownScale(Exception):
    """The scale of an image's values is not known."""


Entry = tuple[Path, int, int]  # file, label, device (-1 for a pool)


def load_folder(config: DataConfig, options: FolderOptions, *, num_devices: int) -> SamplePool:
    """Decode all images once, as bytes (or floats, see above) ``[sample, channel, row, column]``.

    Raises ``ValueError`` for a missing root, class list or device folder, a folder that is not a class, no images, or an image
    whose scale of values is not known.
    """
    root, classes = config.folder, config.classes
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"data.classes is {list(classes or [])}; 'folder' needs the list of class folders, each once")
    if not root.is_dir():
        raise ValueError(
            f"data.root: {root} is not a folder; 'folder' needs <root>/<device>/<class>/ or <root>/<class>/"
        )
    train = _train_entries(root, classes, options, num_devices)
    test = _class_entries(root / "test", classes, -1) if (root / "test").is_dir() else []
    if not train:
        raise ValueError(f"data.root: {root} holds no images ({', '.join(sorted(SUFFIXES))}) in its class folders")
    arrays = cached(
        root, f"folder-{_listing(train + test, root, options)}", lambda: _decode(train, test, root, options)
    )
    owners = arrays["owners"].astype(np.intp) if train[0][2] >= 0 else None
    if owners is not None:
        _check_owners(owners, {device: path.parents[1] for path, _, device in train})
    colour = options.channels == 3
    return SamplePool(
        train=ArraySamples(arrays["train_x"], arrays["train_y"]),
        test=ArraySamples(arrays["test_x"], arrays["test_y"]) if len(arrays["test_y"]) else None,
        owners=owners,
        num_classes=len(classes),
        mean=(0.485, 0.456, 0.406) if colour else (0.5,),  # ImageNet's, as torchvision's pretrained models expect
        std=(0.229, 0.224, 0.225) if colour else (0.5,),
        skipped=int(arrays["skipped"]),
        digest=arrays["digest"].tobytes().hex(),
    )


def _train_entries(root: Path, classes: Sequence[str], options: FolderOptions, num_devices: int) -> list[Entry]:
    """All training images, by device if each device has its folder."""
    folders = [path for path in _folders(root) if path.name != "test"]
    if options.devices is None and any(path.name in classes for path in folders):
        return _class_entries(root, classes, -1, ignored="test")
    names = options.devices or tuple(path.name for path in sorted(folders, key=_natural))
    if len(names) != num_devices:
        raise ValueError(
            f"data.root: {root} has folders for {len(names)} devices, and the fleet has {num_devices}; "
            "name the folders to use, one for each device, in data.kwargs.devices"
        )
    entries = []
    for device, name in enumerate(names):
        if not (root / name).is_dir():
            raise ValueError(f"data.kwargs.devices names {name!r}, but {root / name} is not a folder")
        own = _class_entries(root / name, classes, device)
        if not own:
            raise ValueError(f"data.root: {root / name} holds no images for device {device}")
        entries += own
    return entries


def _class_entries(folder: Path, classes: Sequence[str], device: int, *, ignored: str = "") -> list[Entry]:
    """The images of one folder of class folders, in the order of the class list, then by name."""
    present = {path.name: path for path in _folders(folder) if path.name != ignored}
    if unknown := sorted(present.keys() - set(classes)):
        raise ValueError(
            f"data.classes does not name {unknown[0]!r}, a folder in {folder}; it names: {', '.join(classes)}"
        )
    return [
        (path, label, device)
        for label, name in enumerate(classes)
        if name in present
        for path in sorted(present[name].iterdir())
        if path.suffix.lower() in SUFFIXES
    ]


def _folders(folder: Path) -> list[Path]:
    """The visible folders in ``folder``."""
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that compares digits as numbers."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", path.name)]


def _listing(entries: list[Entry], root: Path, options: FolderOptions) -> str:
    """Hash of names, labels, sizes and modification times: cheap, and sufficient to validate the cached arrays."""
    state = xxhash.xxh3_128(msgspec.json.encode(options))
    for path, label, device in entries:
        stat = path.stat()
        state.update(f"{path.relative_to(root)}\0{label}\0{device}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return state.hexdigest()


def _decode(train: list[Entry], test: list[Entry], root: Path, options: FolderOptions) -> Arrays:
    """Read every file once, for both the digest and the arrays."""
    state = xxhash.xxh3_128(msgspec.json.encode(options))
    arrays: Arrays = {}
    skipped = 0
    for part, entries in (("train", train), ("test", test)):
        side = options.image_size
        x: NDArray[Any] = np.zeros((len(entries), options.channels, side, side), dtype=np.uint8)
        kept: list[Entry] = []
        for path, label, device in entries:
            content = path.read_bytes()
            state.update(f"{path.relative_to(root)}\0{label}\0{device}\0{len(content)}\0".encode() + content)
            try:
                pixels = _pixels(content, options)
            except UNDECODABLE:
                skipped += 1
                continue
            except _UnknownScale as error:
                raise ValueError(f"data.root: {path} {error}") from error
            if pixels.dtype != x.dtype:
                x, pixels = _on_scale_of_1(x), _on_scale_of_1(pixels)
            x[len(kept)] = pixels
            kept.append((path, label, device))
        arrays[f"{part}_x"] = x[: len(kept)]
        arrays[f"{part}_y"] = np.array([label for _, label, _ in kept], dtype=np.int64)
        if part == "train":
            arrays["owners"] = np.array([device for _, _, device in kept], dtype=np.int64)
    arrays["skipped"] = np.array(skipped)
    arrays["digest"] = np.frombuffer(state.digest(), dtype=np.uint8)
    return arrays


def _pixels(content: bytes, options: FolderOptions) -> NDArray[Any]:
    """Decode one image to ``[channel, row, column]``: bytes, or floats on the scale 0..1 if it has more than 8 bits."""
    with Image.open(io.BytesIO(content)) as image:
        deep = image.mode in ("I", "F") or image.mode.startswith("I;")  # converting these would clip values at 255
        colour = "RGB" if options.channels == 3 else "L"
        converted = Image.fromarray(_deep_pixels(image)) if deep else image.convert(colour)
    side = (options.image_size, options.image_size)
    if converted.size != side:
        converted = converted.resize(side, Image.Resampling.BILINEAR)
    pixels = np.asarray(converted)
    if deep:
        return np.repeat(pixels[None], options.channels, axis=0)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _deep_pixels(image: Image.Image) -> NDArray[np.float32]:
    """Pixels of a grey image of 16 bits, or of floats, on the scale 0..1. Raises ``_UnknownScale``."""
    values: NDArray[Any] = np.asarray(image)
    maximum = 1 if image.mode == "F" else _MAX_16_BITS
    low, high = values.min(), values.max()
    known = image.mode != "I" or image.format in ("PNG", "PPM")  # Pillow reads these as 32 bits, of which 16 are used
    if not (known and low >= 0 and high <= maximum):
        raise _UnknownScale(
            f"holds values from {low:g} to {high:g} (mode {image.mode!r} of Pillow); grey images must have 8 or 16 bits, or "
            "floats from 0 to 1"
        )
    return np.asarray(values / maximum, dtype=np.float32)


def _on_scale_of_1(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Convert bytes to floats on the scale 0..1; floats are unchanged."""
    return np.asarray(pixels / 255 if pixels.dtype == np.uint8 else pixels, dtype=np.float32)


def _check_owners(owners: NDArray[np.intp], folders: dict[int, Path]) -> None:
    """Raise ``ValueError`` for a device all of whose images are corrupt."""
    if empty := sorted(folders.keys() - set(owners.tolist())):
        raise ValueError(f"data.root: device {empty[0]} has no image that can be read ({folders[empty[0]]})")
