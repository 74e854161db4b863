"""Makes codecs from a configuration: by built-in name, entry point of the group ``fedbonsai.codecs``, or ``module:Class``."""

import pkgutil
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

import msgspec

from ..codec import Codec, CodecSpec, IdentityCodec, chain
from ..entropy.codec import Entropy, Rans
from .auto import Auto
from .float16 import Float16
from .lz4_codec import Lz4
from .pack import Pack
from .sparse import Sparse
from .sparsify import Threshold, TopK
from .ternary import Ternary
from .uniform import Uniform

BUILT_IN: dict[str, type[Any]] = {
    "entropy": Entropy,
    "rans": Rans,
    "identity": IdentityCodec,
    "topk": TopK,
    "threshold": Threshold,
    "float16": Float16,
    "uniform": Uniform,
    "ternary": Ternary,
    "pack": Pack,
    "lz4": Lz4,
    "sparse": Sparse,
    "auto": Auto,
}
GROUP = "fedbonsai.codecs"


def make_codec(specs: tuple[CodecSpec, ...]) -> Codec:
    """The chain of the specified codecs; the identity for none.

    Raises ``ValueError`` for an unknown name, an unknown option or a wrong value, and for a class that is not a codec.
    """
    return chain(*(_make(spec) for spec in specs))


def _make(spec: CodecSpec) -> Codec:
    """One codec, its options checked against the fields of its class."""
    codec_class = _class_of(spec.name)
    fields = getattr(codec_class, "__dataclass_fields__", None)
    missing = [method for method in ("layout", "encode", "decode") if not callable(getattr(codec_class, method, None))]
    if fields is None or missing:
        problem = f"has no {' and no '.join(missing)}" if missing else "is no dataclass"
        raise ValueError(
            f"codec {spec.name!r}: {codec_class.__name__} {problem}; it must be a frozen dataclass with the methods "
            "layout, encode and decode"
        )
    for option in spec.options:
        if option not in fields:
            allowed = ", ".join(fields) or "none"
            raise ValueError(f"codec {spec.name!r} has no option {option!r}; its options are: {allowed}")
    try:
        codec: Codec = msgspec.convert(spec.options, codec_class)
    except msgspec.ValidationError as error:
        raise ValueError(f"codec {spec.name!r} with options {spec.options}: {error}") from error
    return codec


def _class_of(name: str) -> type[Any]:
    """The class of a name."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" in name:
        try:
            resolved = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"codec {name!r} cannot be imported: {error}") from error
    else:
        plugins = {point.name: point for point in entry_points(group=GROUP)}
        if name not in plugins:
            known = sorted({*BUILT_IN, *plugins})
            close = get_close_matches(name, known, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown codec {name!r}{hint}; known are: {', '.join(known)}, or module:Class")
        try:
            resolved = plugins[name].load()
        except Exception as error:  # the import of a plug-in may raise anything
            raise ValueError(f"codec {name!r} cannot be loaded from {plugins[name].value}: {error}") from error
    if not isinstance(resolved, type):
        raise ValueError(f"codec {name!r} names a {type(resolved).__name__}; it must name a class")
    return resolved
