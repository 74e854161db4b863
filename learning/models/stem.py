"""CIFAR-style stems for torchvision's classifiers: keep small images large in the first layers.

Torchvision's networks shrink a 224x224 image four times before the first block; of a 32x32 image nothing would be left.
The usual CIFAR variant (He et al., arXiv 1512.03385, sec. 4.2; Huang et al., arXiv 1608.06993) has a 3x3 convolution of stride
1 in place of a 7x7 one of stride 2, and no max-pooling after it; families whose stem is 3x3 already only lose the stride.
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

FAMILIES = "ResNet, ResNeXt, WideResNet, DenseNet, MobileNetV2/V3, EfficientNet, ShuffleNetV2, RegNet, MNASNet"


def _resnet(model: nn.Module) -> None:
    model.conv1 = _three_by_three(model.conv1, mode="fan_out")
    model.maxpool = nn.Identity()


def _densenet(model: nn.Module) -> None:
    features = model.features
    assert isinstance(features, nn.Sequential)
    features.conv0 = _three_by_three(features.conv0, mode="fan_in")
    features.pool0 = nn.Identity()


def _shufflenet(model: nn.Module) -> None:
    _unstride(model.conv1)
    model.maxpool = nn.Identity()


# By the name of torchvision's class; all models of a family share it.
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "ResNet": _resnet,
    "DenseNet": _densenet,
    "ShuffleNetV2": _shufflenet,
    "MobileNetV2": lambda model: _unstride(model.features),
    "MobileNetV3": lambda model: _unstride(model.features),
    "EfficientNet": lambda model: _unstride(model.features),
    "RegNet": lambda model: _unstride(model.stem),
    "MNASNet": lambda model: _unstride(model.layers),
}


def apply_stem(model: nn.Module, stem: str, *, name: str) -> None:
    """Change ``model``, one of torchvision's, in place to ``stem``: ``imagenet`` (as it is) or ``cifar``.

    ``name``: the model's name, for errors. A new convolution is initialised as torchvision initialises that family's, from
    the current random state. Raises ``ValueError`` for another stem, and for a family that has no CIFAR variant.
    """
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"model.kwargs: stem is {stem!r}; it may be imagenet or cifar")
    if stem == "imagenet":
        return
    if (change := CHANGES.get(type(model).__name__)) is None:
        raise ValueError(f"model.kwargs: stem is 'cifar', which {name!r} does not have; these families do: {FAMILIES}")
    change(model)


def _three_by_three(old: object, *, mode: Literal["fan_in", "fan_out"]) -> nn.Conv2d:
    assert isinstance(old, nn.Conv2d)
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode=mode, nonlinearity="relu" if mode == "fan_out" else "leaky_relu")
    return new


def _unstride(part: object) -> None:
    """The first convolution of ``part`` to stride 1; its weights stay."""
    assert isinstance(part, nn.Module)
    first = next(module for module in part.modules() if isinstance(module, nn.Conv2d))
    first.stride = (1, 1)
