"""Transforms of whole batches: ``(x, generator) -> x``. Vectorised, and random only through the generator.

Images are ``x[sample, channel, row, column]``, as bytes or as floats on the scale 0..1. The output of a chain is never images
as bytes: if no transform converts them to floats, they are scaled to 0..1 at its end. Bytes of any other shape (tables, tokens)
are not pixels, and stay unchanged. Crop and flip as in He et al., CVPR 2016 (arXiv 1512.03385, sec. 4.2).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..resolve import error_line, resolve
from ..spec import Call, Count, Fraction, Positive
from .types import Transform


class Normalize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scale bytes to 0..1, then ``(x - mean) / std`` for each channel (dimension 1). Without ``mean`` only scale."""

    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if mean and standard deviation have different lengths."""
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"normalize: mean has {len(self.mean)} values and std {len(self.std)}; both must have the same length"
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a float copy."""
        scale = 255.0 if x.dtype == torch.uint8 else 1.0
        values = x.to(torch.float32, copy=True)
        if not self.mean:
            return values.div_(scale)
        if x.dim() < 2 or len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"normalize: mean has {len(self.mean)} values, but the batch has shape {tuple(x.shape)}")
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        mean = torch.tensor(self.mean, device=x.device).view(shape)
        std = torch.tensor(self.std, device=x.device).view(shape)
        return values.sub_(mean * scale).div_(std * scale)


class RandomCrop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pad with zeros (black) on all sides, then crop to the original size at a random position for each image."""

    padding: Count = 4

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a copy of the same shape."""
        _check_images(x, "random_crop")
        count, _, height, width = x.shape
        padded = torch.nn.functional.pad(x, [self.padding] * 4)
        corners = torch.randint(0, 2 * self.padding + 1, (2, count, 1), generator=generator).to(x.device)
        rows = corners[0] + torch.arange(height, device=x.device)
        columns = corners[1] + torch.arange(width, device=x.device)
        images = torch.arange(count, device=x.device)[:, None, None]
        # Indices around a slice put the channel last; move it back, in row-major order.
        return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class RandomFlip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Mirror left to right, each image with this probability."""

    probability: Fraction = 0.5

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a copy of the same shape."""
        _check_images(x, "random_flip")
        chosen = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) < self.probability
        return torch.where(chosen, x.flip(-1), x)


class Resize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Resize to square images of ``size`` pixels a side, as floats on the scale 0..1 (bilinear, antialiased)."""

    size: Count

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``[sample, channel, size, size]``."""
        _check_images(x, "resize")
        values = Normalize()(x, generator)
        return torch.nn.functional.interpolate(values, size=(self.size, self.size), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class UserTransform:
    """A user's own function, called ``function(x, generator, **kwargs)``."""

    function: Callable[..., Tensor]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Call the function."""
        return self.function(x, generator, **self.kwargs)


@dataclass(frozen=True)
class TransformChain:
    """Applies transforms one after another. Images of bytes are converted to floats at the end, also by an empty chain."""

    links: tuple[Transform, ...] = ()

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Apply all transforms to a batch."""
        for link in self.links:
            x = link(x, generator)
        return Normalize()(x, generator) if x.dtype == torch.uint8 and x.dim() == 4 else x


BUILT_IN = {"normalize": Normalize, "random_crop": RandomCrop, "random_flip": RandomFlip, "resize": Resize}


def build(calls: Sequence[Call], *, field: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Transform:
    """Build the chain that ``calls`` names; if it is empty, the data set's normalisation by ``mean`` and ``std``.

    ``normalize`` without arguments uses the data set's too. ``field``: the configuration field, for errors.
    Raises ``ValueError`` for an unknown name or keyword.
    """
    standard = Normalize(mean, std)
    if not calls:
        return TransformChain((standard,)) if mean else TransformChain()
    return TransformChain(tuple(_link(call, field=field, standard=standard) for call in calls))


def apply_checked(transform: Transform, x: Tensor, *, field: str) -> Tensor:
    """Apply a transform with random seed 0. Any exception becomes a ``ValueError`` that names the setting ``field``."""
    try:
        return transform(x, torch.Generator().manual_seed(0))
    except Exception as error:  # a user's code may raise anything
        raise ValueError(
            f"{field} fail on a batch of shape {tuple(x.shape)} ({x.dtype}): {error_line(error)}"
        ) from error


def _link(call: Call, *, field: str, standard: Normalize) -> Transform:
    """Build one transform."""
    if ":" in call.name:
        function = resolve(call.name, what=field)
        try:
            inspect.signature(function).bind(None, None, **call.kwargs)
        except TypeError as error:
            raise ValueError(f"{field}: {call.name!r} is called as fn(x, generator, **kwargs), but: {error}") from None
        return UserTransform(function, dict(call.kwargs))
    if call.name not in BUILT_IN:
        raise ValueError(f"{field} names {call.name!r}; allowed: {', '.join(sorted(BUILT_IN))}, or module:function")
    if call.name == "normalize" and not call.kwargs:
        return standard
    try:
        link: Transform = msgspec.convert(call.kwargs, BUILT_IN[call.name])
    except msgspec.ValidationError as error:
        raise ValueError(f"{field}: the keywords of {call.name!r} do not fit: {error}") from None
    return link


def _check_images(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` for anything but a batch of images."""
    if x.dim() != 4:
        raise ValueError(
            f"{name} needs images [sample, channel, row, column], but the batch has shape {tuple(x.shape)}"
        )
