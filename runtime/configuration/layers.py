"""Layers of a configuration: conversion to plain data, shorthands, ``a.b=value``, and merging.

    model: digits_cnn                   model: {name: digits_cnn}
    policy: random                      policy: [{name: random}]
    codecs: {up: [{name: lz4, level: 3}]}   codecs: {up: [{name: lz4, options: {level: 3}}]}

Shorthands of each layer are expanded before it is merged, so that ``--set model.kwargs.width=4`` adds to a model that was
given by its bare name.
"""

import numbers
import os
from collections.abc import Mapping
from typing import Any

from ...clusters.units import shown
from ...clusters.yaml_text import MOST_DEPTH, is_unicode, parse_yaml
from ..errors import ConfigError

_NAMED = ("model", "data.partition", "training.loss", "server.public")  # a bare name stands for a mapping
_LISTS = (  # lists of such
    "policy",
    "evaluation.metrics",
    "data.train_transforms",
    "data.test_transforms",
    "server.public.test_transforms",
)
_CODECS = ("codecs.down", "codecs.up")  # lists of such, with options beside the name


def to_plain(value: Any, path: str = "", *, depth: int = 0) -> Any:
    """Settings that are Python objects as YAML would hold them: mappings and lists of numbers, text, booleans and None.

    Paths become text, numpy's numbers Python's, tuples lists. Raises ``ConfigError`` with the field for anything else.
    """
    subject = path or "the configuration"
    if depth > MOST_DEPTH:
        raise ConfigError(f"{path[:80]} is nested more than {MOST_DEPTH} deep")
    if isinstance(value, Mapping):
        return {
            to_plain(key, f"{subject}: a key", depth=depth + 1): to_plain(
                item, f"{path}.{key}".lstrip("."), depth=depth + 1
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{path}[{position}]", depth=depth + 1) for position, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if not is_unicode(value):
            raise ConfigError(f"{subject} is {shown(value)}, which holds half of a surrogate pair; it must be text")
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:  # numpy.bool is not a number
        return to_plain(value.item(), path, depth=depth + 1)
    type_name = f"{type(value).__module__}.{type(value).__qualname__}"
    raise ConfigError(
        f"{subject} is {shown(value)}, a {type_name}; it must be text, a number, true, false, null, a list or a mapping"
    )


def path_problem(path: str) -> str:
    """Why no file can have this name, as the end of a sentence; "" if one can."""
    if "\0" in path:
        return "which holds a NUL; no file can be named so"
    if not is_unicode(path):
        return "which is not text in UTF-8; name another path"
    return ""


def parse_setting(text: str) -> dict[str, Any]:
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
    """The layer with its shorthands expanded; values of an unknown shape are left for the conversion to refuse."""
    expanded = dict(layer)
    for path in _NAMED:
        _apply(expanded, path, _named)
    if isinstance(expanded.get("models"), Mapping):
        expanded["models"] = {name: _named(model) for name, model in expanded["models"].items()}
    for path in _LISTS:
        _apply(expanded, path, lambda value: [_named(entry) for entry in value] if _listed(value) else value)
    for path in _CODECS:
        _apply(expanded, path, lambda value: [_codec(entry) for entry in value] if _listed(value) else value)
    return expanded


def merge(below: Any, above: Any, path: str = "") -> Any:
    """``above`` over ``below``: mappings key by key, list entries by their number (``policy.0.cohort``), the rest replaced.

    Another model, partition, loss or fleet replaces the old one completely, since its arguments differ. Raises
    ``ConfigError`` for the number of a list entry that does not exist.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        named = path in (*_NAMED, "fleet") or path.startswith("models.")
        if named and above.get("name", below.get("name")) != below.get("name"):
            return above
        prefix = f"{path}." if path else ""
        return below | {
            key: merge(below[key], value, f"{prefix}{key}") if key in below else value for key, value in above.items()
        }
    if isinstance(below, list | tuple) and _numbered(above):
        merged = list(below)
        for key, value in above.items():
            if int(key) >= len(merged):
                raise ConfigError(f"{path}.{key} does not exist: {path} has {len(merged)} entries, counted from 0")
            merged[int(key)] = merge(merged[int(key)], value, f"{path}.{key}")
        return merged
    return above


def _apply(layer: dict[str, Any], path: str, change: Any) -> None:
    """Replace the value at ``path``, if there is one, by ``change(value)``; mappings that contain it are copied."""
    *sections, field = path.split(".")
    holder: Any = layer
    for section in sections:
        if not isinstance(holder.get(section), Mapping):
            return
        holder[section] = dict(holder[section])
        holder = holder[section]
    if field in holder:
        value = holder[field]
        # A single entry stands for a list of one; a mapping of numbers sets list entries of the layer below.
        if path not in _NAMED and isinstance(value, str | Mapping) and value and not _numbered(value):
            value = [value]
        holder[field] = change(value)


def _named(value: Any) -> Any:
    """A bare name as a mapping."""
    return {"name": value} if isinstance(value, str) else value


def _codec(value: Any) -> Any:
    """``lz4`` or ``{name: lz4, level: 3}`` as a mapping of name and options."""
    entry = _named(value)
    if not isinstance(entry, Mapping) or "options" in entry or "name" not in entry:
        return entry
    return {"name": entry["name"], "options": {key: option for key, option in entry.items() if key != "name"}}


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _numbered(value: Any) -> bool:
    """Whether a value is a mapping of list positions."""
    return isinstance(value, Mapping) and bool(value) and all(str(key).isdecimal() for key in value)
