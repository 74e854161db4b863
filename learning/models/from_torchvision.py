"""Any of torchvision's classifiers by name, with a stem that fits the image and a head that fits the classes."""

from functools import cache
from typing import Any

from torch import nn

from ..compat import import_torchvision
from .stem import CHANGES, apply_stem


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
    """Torchvision's classifier ``name`` with its own ``kwargs``, to which we add ``stem`` (see ``apply_stem``).

    Without ``weights`` its start is random. ``outputs``: number of classes, when ``num_classes`` is not among ``kwargs``;
    pretrained weights of another number of classes get a fresh last layer. Raises ``ValueError`` for arguments that
    torchvision refuses and for unknown weights.
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
            # Their extra heads make the output a tuple in training, which no loss expects.
            arguments.setdefault("aux_logits", False)
            arguments.setdefault("init_weights", True)  # torchvision's default, which it wants to be named
    try:
        model: nn.Module = models.get_model(name, **arguments)
    except TypeError as error:
        raise ValueError(f"model.kwargs: torchvision's {name!r} refuses its arguments: {error}") from error
    apply_stem(model, kwargs.get("stem", "imagenet"), name=name)
    if pretrained and outputs is not None and "num_classes" not in arguments:
        replace_head(model, outputs)
    return model


def replace_head(model: nn.Module, outputs: int) -> None:
    """Give ``model`` a fresh last layer of ``outputs`` outputs, in place, unless it has that many already."""
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
