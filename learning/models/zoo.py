"""Models by name: built in, any torchvision classifier, or the user's ``module:function``."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..randomness import seeded
from ..resolve import resolve
from ..spec import Call
from .cnn import digits_cnn, resfed_cnn, small, vgg11_bn, vgg16_bn
from .from_torchvision import describe, torchvision_model, torchvision_names

PREFIX = "torchvision/"
Builder = Callable[..., object]


def resnet18(num_classes: int = 10, *, stem: str = "cifar") -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max-pooling, for 32x32 images; 11,173,962 parameters."""
    return torchvision_model("resnet18", {"stem": stem}, outputs=num_classes)


OWN: dict[str, Builder] = {
    "digits_cnn": digits_cnn,
    "resfed_cnn": resfed_cnn,
    "resnet18": resnet18,
    "small": small,
    "vgg11_bn": vgg11_bn,
    "vgg16_bn": vgg16_bn,
}


def names() -> dict[str, str]:
    """All model names with a one-line description: the built-in ones first, then torchvision's."""
    own = {name: (inspect.getdoc(builder) or "").partition("\n")[0] for name, builder in OWN.items()}
    return own | {PREFIX + name: describe(name) for name in torchvision_names()}


def build(call: Call, *, seed: int, outputs: int | None) -> nn.Module:
    """Build the model that ``call`` names, with weights drawn from ``seed`` alone: equal seeds give equal bits.

    ``outputs``: number of classes in the data, or None; it is passed as ``num_classes`` if the builder has that parameter and
    the user gave no value. A bare name that is not built in is looked up in torchvision. Raises ``ValueError`` for an unknown
    name and for arguments that the builder does not accept.
    """
    make = _find(call, outputs=outputs)
    # The global generator is restored afterwards. Only the CPU's is seeded, since models are built on the CPU.
    with seeded(seed):
        model = make()
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"model.name is {call.name!r}, which returned a {kind}; it must return an nn.Module")
    if scripted := [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]:
        which = f"whose {scripted[0]!r} is" if scripted[0] else "which returned"
        raise ValueError(
            f"model.name is {call.name!r}, {which} a TorchScript module; it must be made of plain nn.Modules, since scripted "
            "code can neither be cut into blocks nor counted"
        )
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model.name is {call.name!r}, which has no parameters: there is nothing to train")
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise ValueError(f"model.name is {call.name!r}, which has lazy layers; give them their sizes")
    if extra := [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"model.name is {call.name!r}, whose state holds {extra[0]!r}; it must hold tensors only")
    return model


def _find(call: Call, *, outputs: int | None) -> Callable[[], object]:
    """Look the builder up and bind its arguments."""
    if ":" in call.name:
        builder = resolve(call.name, what="model.name")
        if not callable(builder):
            kind = type(builder).__name__
            raise ValueError(f"model.name is {call.name!r}, which is a {kind}; it must be a function or a class")
    elif call.name in OWN:
        builder = OWN[call.name]
    else:
        return partial(torchvision_model, _torchvision_name(call.name), call.kwargs, outputs=outputs)
    signature = inspect.signature(builder)
    kwargs = dict(call.kwargs)
    if outputs is not None and "num_classes" in signature.parameters:
        kwargs.setdefault("num_classes", outputs)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        allowed = ", ".join(signature.parameters) or "none"
        raise ValueError(f"model.kwargs of {call.name!r}: {error}; its parameters are: {allowed}") from error
    return partial(builder, **kwargs)


def _torchvision_name(name: str) -> str:
    bare = name.removeprefix(PREFIX)
    if bare in torchvision_names():
        return bare
    known = {*OWN, *torchvision_names(), *(PREFIX + known for known in torchvision_names())}
    close = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"model.name is {name!r}, which is unknown; {hint}`fedbonsai models` lists all names")


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Make every batch normalisation of ``model`` use the statistics of the current batch, in place; returns ``model``.

    This holds in evaluation too. Running means, variances and counters are removed from the model's state. EcoFed's code (arXiv
    2304.05495) sets ``track_running_stats=False`` everywhere, and HeteroFL (Diao et al., arXiv 2010.01264, "static batch
    normalisation") trains so: only weights then have to be averaged and sent.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            # The flag alone is not enough: in evaluation torch uses running statistics as long as they exist.
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model
