"""Pretrained initial weights: read from a file or from torchvision, checked, and copied into a model.

The server and every worker read the file themselves. The server records the hash of its tensors in the settings, so that a
worker with a different file is detected.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import msgspec
import torch
from torch import Tensor, nn

from .compat import import_torchvision
from .models.zoo import PREFIX
from .parts.blocks import model_spec
from .parts.structure import ModelSpec, TensorSpec
from .store import model_hash
from .workload_settings import TORCHVISION, Initialisation


def with_weights_hash(init: Initialisation, *, model: str) -> Initialisation:
    """Return ``init`` with the hash of its weights, by which workers check theirs. Raises as ``read_weights`` does."""
    if init.mode == "random":
        return init
    return msgspec.structs.replace(init, hash=model_hash(read_weights(init, model=model)))


def read_weights(init: Initialisation, *, model: str) -> dict[str, Tensor]:
    """Read the tensors that ``init`` refers to, for the model named ``model``.

    Raises ``ValueError`` if they cannot be read, or if their hash is not ``init.hash``.
    """
    path = init.file
    weights = _published(model) if path is None else _from_file(path)
    if init.hash is not None and (actual := model_hash(weights)) != init.hash:
        raise ValueError(
            f"init.weights is {init.weights!r}, whose tensors have the hash {actual} here; expected is {init.hash}"
        )
    return weights


def initialise(model: nn.Module, weights: Mapping[str, Tensor], init: Initialisation) -> tuple[str, ...]:
    """Copy ``weights`` into ``model`` as ``init.mode`` says; returns the names of the tensors that keep their initial values.

    Tensors that the model does not have are ignored. A counter that is missing from the weights keeps its initial value. Raises
    ``ValueError`` if ``init.trunk`` is not a block, or if a tensor is missing, has another shape or kind, or is not finite.
    """
    spec = model_spec(model)
    required, kept = _required(spec, init), list[str]()
    state, last = model.state_dict(), {tensor.name for tensor in spec.blocks[-1].tensors}
    for tensor in required:
        if tensor.name not in weights and tensor.role == "counter":
            continue
        if tensor.name not in weights and init.missing == "keep":
            kept.append(tensor.name)
            continue
        if _other_shape(tensor, weights) and init.mode == "holistic" and tensor.name in last:
            kept.append(tensor.name)
            continue
        _check(tensor, weights, init)
        with torch.no_grad():
            state[tensor.name].copy_(weights[tensor.name])
    if len(kept) == len(required):
        raise ValueError(f"init.weights is {init.weights!r}, of whose tensors none fits the model")
    return tuple(kept)


def _required(spec: ModelSpec, init: Initialisation) -> tuple[TensorSpec, ...]:
    """The tensors that the mode takes from the weights."""
    names = spec.block_names
    if init.mode == "holistic":
        return spec.tensors_of(names)
    trunk = names[0] if init.trunk is None else init.trunk
    if trunk not in names:
        raise ValueError(
            f"init.trunk is {trunk!r}, which is not a block of this model; its blocks are: {', '.join(names)}"
        )
    return spec.tensors_of(names[: names.index(trunk) + 1])


def _other_shape(tensor: TensorSpec, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights have the tensor in another shape."""
    return tensor.name in weights and tuple(weights[tensor.name].shape) != tensor.shape


def _check(tensor: TensorSpec, weights: Mapping[str, Tensor], init: Initialisation) -> None:
    """Raise ``ValueError`` for a tensor that does not fit."""
    file = f"init.weights is {init.weights!r}"
    expected = f"the model expects {tensor.name!r} of shape {tensor.shape}"
    if tensor.name not in weights:
        raise ValueError(f"{file}, which has no such tensor: {expected}")
    value = weights[tensor.name]
    if _other_shape(tensor, weights):
        raise ValueError(f"{file}, where {tensor.name!r} has shape {tuple(value.shape)}; {expected}")
    if value.is_floating_point() == (tensor.role == "counter"):
        raise ValueError(f"{file}, where {tensor.name!r} is of type {value.dtype}; the model's is {tensor.dtype}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{file}, where {tensor.name!r} has values that are not finite")


def _from_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except OSError as error:
        raise ValueError(f"init.weights is {str(path)!r}, which cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"init.weights is {str(path)!r}, which is not a safetensors file: {error}") from error
    return tensors


def _published(model: str) -> dict[str, Tensor]:
    """Torchvision's default weights, by its own loader: from its cache, or downloaded and checked."""
    name = model.removeprefix(PREFIX)
    if not model.startswith(PREFIX):
        raise ValueError(f"init.weights is {TORCHVISION!r}, which is for models {PREFIX}NAME; model.name is {model!r}")
    default = getattr(import_torchvision().models.get_model_weights(name), "DEFAULT", None)
    if default is None:
        raise ValueError(f"init.weights is {TORCHVISION!r}, but torchvision publishes no weights of {name!r}")
    try:
        tensors: dict[str, Tensor] = default.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network; a truncated or wrong file
        raise ValueError(f"init.weights is {TORCHVISION!r}; {default} could not be loaded: {error}") from error
    return tensors
