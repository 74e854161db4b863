"""Weights that were trained elsewhere: read from a file or from torchvision, checked, and taken over into a model.

Server and workers each read the same file; the hash of its tensors, which the server side notes, tells if they did not.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import msgspec
import torch
from torch import Tensor, nn

from .compat import import_torchvision
from .initialisation import TORCHVISION, Initialisation
from .models.zoo import PREFIX
from .parts.blocks import model_spec
from .parts.structure import ModelSpec, TensorSpec
from .store import model_hash


def pinned(init: Initialisation, *, model: str) -> Initialisation:
    """``init`` with the hash of its weights noted, for those who read them elsewhere. Errors as of ``read_weights``."""
    if init.mode == "random":
        return init
    return msgspec.structs.replace(init, hash=model_hash(read_weights(init, model=model)))


def read_weights(init: Initialisation, *, model: str) -> dict[str, Tensor]:
    """The tensors that ``init`` names, for the model of that name.

    Raises ``ValueError`` when they cannot be read, or have another hash than ``init`` says.
    """
    path = init.file
    found = _published(model) if path is None else _from_file(path)
    if init.hash is not None and (actual := model_hash(found)) != init.hash:
        raise ValueError(
            f"init.weights is {init.weights!r}, whose tensors have the hash {actual} here; expected is {init.hash}"
        )
    return found


def initialise(model: nn.Module, found: Mapping[str, Tensor], init: Initialisation) -> tuple[str, ...]:
    """Take tensors of ``found`` over into ``model``, in place; the names of those that the mode asks for and that stay random.

    Tensors that the model does not have are passed over, and a counter that is missing starts at its start. Raises
    ``ValueError`` for a trunk that is no block, and for a tensor that is missing, of another shape or kind, or not finite.
    """
    spec = model_spec(model)
    wanted, kept = _wanted(spec, init), list[str]()
    held, last = model.state_dict(), {tensor.name for tensor in spec.blocks[-1].tensors}
    for tensor in wanted:
        if tensor.name not in found and tensor.role == "counter":
            continue
        if tensor.name not in found and init.missing == "keep":
            kept.append(tensor.name)
            continue
        if _other_shape(tensor, found) and init.mode == "holistic" and tensor.name in last:
            kept.append(tensor.name)
            continue
        _check(tensor, found, init)
        with torch.no_grad():
            held[tensor.name].copy_(found[tensor.name])
    if len(kept) == len(wanted):
        raise ValueError(f"init.weights is {init.weights!r}, of whose tensors none has the shape that the model has")
    return tuple(kept)


def _wanted(spec: ModelSpec, init: Initialisation) -> tuple[TensorSpec, ...]:
    """The tensors that the mode asks for."""
    names = spec.block_names
    if init.mode == "holistic":
        return spec.tensors_of(names)
    trunk = names[0] if init.trunk is None else init.trunk
    if trunk not in names:
        raise ValueError(
            f"init.trunk is {trunk!r}, which is no block of this model; its blocks are: {', '.join(names)}"
        )
    return spec.tensors_of(names[: names.index(trunk) + 1])


def _other_shape(tensor: TensorSpec, found: Mapping[str, Tensor]) -> bool:
    """Whether the tensor is there, in another shape."""
    return tensor.name in found and tuple(found[tensor.name].shape) != tensor.shape


def _check(tensor: TensorSpec, found: Mapping[str, Tensor], init: Initialisation) -> None:
    """Refuse what does not fit."""
    file = f"init.weights is {init.weights!r}"
    expected = f"the model expects {tensor.name!r} of shape {tensor.shape}"
    if tensor.name not in found:
        raise ValueError(f"{file}, which has no such tensor: {expected}")
    value = found[tensor.name]
    if _other_shape(tensor, found):
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
    """Torchvision's default weights, through its own loader: from its cache, or else fetched and checked."""
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
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network; a file that is cut off or another
        raise ValueError(f"init.weights is {TORCHVISION!r}; {default} could not be loaded: {error}") from error
    return tensors
