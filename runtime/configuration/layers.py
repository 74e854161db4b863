"""Layers of a configuration: made plain, shorthands spelled out, ``a.b=value`` read, one layer merged over another.

    model: digits_cnn                   model: {name: digits_cnn}
    policy: random                      policy: [{name: random}]
    codecs: {up: [{name: lz4, level: 3}]}   codecs: {up: [{name: lz4, options: {level: 3}}]}

Each layer is spelled out before it is merged, so that ``--set model.kwargs.width=4`` adds to a model that was given by
its bare name.
"""

import numbers
import os
from collections.abc import Mapping
from typing import Any

from ...clusters.units import shown
from ...clusters.yaml_text import MOST_DEPTH, is_unicode, parse_yaml
from ..errors import ConfigError

_NAMED = ("model", "data.partition", "training.loss")  # a bare name stands for the mapping
_LISTS = ("policy", "evaluation.metrics", "data.train_transforms", "data.test_transforms")  # lists of such
_CODECS = ("codecs.down", "codecs.up")  # lists of such, whose options may stand beside the name


def plain(value: Any, path: str = "", *, depth: int = 0) -> Any:
    """Settings that were given as Python objects, as YAML would have them: mappings and lists of numbers, text and None.

    Paths become text, numpy's numbers Python's, tuples lists. Raises ``ConfigError`` for all else, with the field.
    """
    here = path or "the configuration"
    if depth > MOST_DEPTH:
        raise ConfigError(f"{path[:80]} is nested more than {MOST_DEPTH} deep")
    if isinstance(value, Mapping):
        return {
            plain(key, f"{here}: a key", depth=depth + 1): plain(item, f"{path}.{key}".lstrip("."), depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{place}]", depth=depth + 1) for place, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if not is_unicode(value):
            raise ConfigError(f"{here} is {shown(value)}, which holds half of a surrogate pair; it must be text")
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:  # its bool is no number
        return plain(value.item(), path, depth=depth + 1)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise ConfigError(
        f"{here} is {shown(value)}, a {kind}; it must be text, a number, true, false, null, a list or a mapping"
    )


def path_problem(path: str) -> str:
    """Why there can be no file of this name, as the end of a sentence; "" where there can be."""
    if "\0" in path:
        return "which holds a NUL; no file can be named so"
    if not is_unicode(path):
        return "which is not text in UTF-8; name another path"
    return ""


def setting(text: str) -> dict[str, Any]:
    """``a.b=value`` as a layer; the value is read as YAML. Raises ``ConfigError``."""
    path, sign, value = text.partition("=")
    if not sign or not all(path.split(".")):
        raise ConfigError(f"--set is {text!r}; it must have the form section.field=value")
    try:
        layer: Any = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"--set is {text!r}, whose value is not YAML: {error}") from error
    first, *inner = path.split(".")
    for key in reversed(inner):
        layer = {key: layer}
    return {first: layer}


def expand_shorthands(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The layer with its shorthands spelled out; what is of no known shape is left for the conversion to refuse."""
    spelled = dict(layer)
    for path in _NAMED:
        _apply(spelled, path, _named)
    for path in _LISTS:
        _apply(spelled, path, lambda value: [_named(entry) for entry in value] if _listed(value) else value)
    for path in _CODECS:
        _apply(spelled, path, lambda value: [_codec(entry) for entry in value] if _listed(value) else value)
    return spelled


def merge(below: Any, above: Any, path: str = "") -> Any:
    """Mappings are merged key by key; a list entry is set by its number (``policy.0.cohort``); anything else is replaced.

    Another model, partition, loss or fleet replaces the old one whole: its arguments are not the old one's. Raises
    ``ConfigError`` for the number of an entry that is not there.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        if path in (*_NAMED, "fleet") and above.get("name", below.get("name")) != below.get("name"):
            return above
        here = f"{path}." if path else ""
        return below | {
            key: merge(below[key], value, f"{here}{key}") if key in below else value for key, value in above.items()
        }
    if isinstance(below, list | tuple) and _numbered(above):
        merged = list(below)
        for key, value in above.items():
            if int(key) >= len(merged):
                raise ConfigError(
                    f"{path}.{key} is not there: {path} has {len(merged)} entries, and the first is {path}.0"
                )
            merged[int(key)] = merge(merged[int(key)], value, f"{path}.{key}")
        return merged
    return above


def _apply(layer: dict[str, Any], path: str, change: Any) -> None:
    """Change what stands at ``path``, where something does; mappings on the way are copied."""
    section, _, field = path.rpartition(".")
    holder: Any = layer
    if section:
        if not isinstance(layer.get(section), Mapping):
            return
        holder = layer[section] = dict(layer[section])
    if field in holder:
        value = holder[field]
        # One entry may stand for a list of one; a mapping of numbers sets entries of a list below.
        if path not in _NAMED and isinstance(value, str | Mapping) and value and not _numbered(value):
            value = [value]
        holder[field] = change(value)


def _named(value: Any) -> Any:
    """A bare name as a mapping."""
    return {"name": value} if isinstance(value, str) else value


def _codec(value: Any) -> Any:
    """``lz4`` or ``{name: lz4, level: 3}`` as a name with options."""
    entry = _named(value)
    if not isinstance(entry, Mapping) or "options" in entry or "name" not in entry:
        return entry
    return {"name": entry["name"], "options": {key: option for key, option in entry.items() if key != "name"}}


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _numbered(value: Any) -> bool:
    """Whether a mapping names entries of a list."""
    return isinstance(value, Mapping) and bool(value) and all(str(key).isdecimal() for key in value)
