"""Torchvision's classifiers by name, with a stem for small images and a head for the number of classes.

Torchvision's networks shrink a 224x224 image several times before the first block; of a 32x32 image nothing would be left.
The usual CIFAR variant (He et al., arXiv 1512.03385, sec. 4.2; Huang et al., arXiv 1608.06993) has a 3x3 convolution of stride
1 instead of a 7x7 one of stride 2, and no max-pooling after it; families whose stem is already 3x3 only lose the stride.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from torch import nn

from ..compat import import_torchvision


@cache
def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's classifiers, sorted."""
    models = import_torchvision().models
    return tuple(sorted(models.list_models(module=models)))


def describe(name: str) -> str:
    """One line on one of torchvision's classifiers."""
    models = import_torchvision().models
    builder = models.get_model_builder(name)
    family = builder.__annotations__.get("return", nn.Module)
    stems = "stem: imagenet or cifar" if getattr(family, "__name__", "") in CHANGES else "stem: imagenet"
    return f"torchvision's {name}; {stems}"


def torchvision_model(name: str, kwargs: dict[str, Any], *, outputs: int | None) -> nn.Module:
    """Build torchvision's classifier ``name`` with its own ``kwargs``, and ``stem`` in addition (see ``apply_stem``).

    Without ``weights`` its initial weights are random. ``outputs``: number of classes, if ``num_classes`` is not among
    ``kwargs``; a pretrained model of another number of classes gets a new last layer. Raises ``ValueError`` for arguments that
    torchvision refuses, and for unknown weights.
    """
    models = import_torchvision().models
    arguments = {key: value for key, value in kwargs.items() if key != "stem"}
    pretrained = arguments.get("weights") is not None
    if pretrained:
        _check_weights(models, name, arguments["weights"])
    else:
        if outputs is not None:
            arguments.setdefault("num_classes", outputs)
        if name in ("googlenet", "inception_v3"):
            # Their auxiliary heads make the output a tuple in training, which no loss expects.
            arguments.setdefault("aux_logits", False)
            arguments.setdefault("init_weights", True)  # torchvision's default; without it torchvision warns
    try:
        model: nn.Module = models.get_model(name, **arguments)
    except TypeError as error:
        raise ValueError(f"model.kwargs: torchvision's {name!r} refuses its arguments: {error}") from error
    apply_stem(model, kwargs.get("stem", "imagenet"), name=name)
    if pretrained and outputs is not None and "num_classes" not in arguments:
        replace_head(model, outputs)
    return model


def replace_head(model: nn.Module, outputs: int) -> None:
    """Replace the last layer of ``model`` by a new one of ``outputs`` outputs, in place, unless it has that many already."""
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(last, nn.Linear) and last.out_features != outputs:
        setattr(parent, name.rpartition(".")[2], nn.Linear(last.in_features, outputs, bias=last.bias is not None))
    elif isinstance(last, nn.Conv2d) and last.out_channels != outputs:
        assert last.kernel_size == (1, 1), "SqueezeNet's classifier is the only convolutional one"
        setattr(parent, name.rpartition(".")[2], nn.Conv2d(last.in_channels, outputs, 1, bias=last.bias is not None))


def _check_weights(models: Any, name: str, weights: Any) -> None:
    allowed = [entry.name for entry in models.get_model_weights(name)]
    if str(weights).rpartition(".")[2] not in [*allowed, "DEFAULT"]:
        raise ValueError(
            f"model.kwargs: weights is {weights!r}; for {name!r} it may be {', '.join(allowed)} or DEFAULT"
        )


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


# By the name of torchvision's class, which all models of a family share.
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
    """Give ``model``, one of torchvision's, the stem ``imagenet`` (unchanged) or ``cifar``, in place.

    ``name``: the model's name, for errors. A new convolution is initialised as torchvision initialises that family's, from
    the current random state. Raises ``ValueError`` for any other stem, and for a family that has no CIFAR variant.
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
    """Set the first convolution of ``part`` to stride 1; its weights stay."""
    assert isinstance(part, nn.Module)
    first = next(module for module in part.modules() if isinstance(module, nn.Conv2d))
    first.stride = (1, 1)
