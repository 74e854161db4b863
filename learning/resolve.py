"""Imports a user's own model, loss, metric, data set, transform or policy, named in a configuration as ``module:function``."""

import importlib
import importlib.util
from typing import Any


def resolve(path: str, *, what: str) -> Any:
    """Import the object that ``path`` names: ``package.module:attribute``, where the attribute may be dotted too.

    ``what``: the configuration's field, for the error (``model.name``). Raises ``ValueError`` if the path is malformed, if
    there is no such module on the import path, or no such attribute in it. An error raised *inside* the user's module is passed
    on unchanged: its traceback is what the user needs.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise ValueError(f"{what} is {path!r}; to name something of your own write module:function, as in my_code:make")
    from .compat import declare_missing_operators  # imported here, since this file must be importable without torch

    declare_missing_operators()
    value = _import(module_name, path=path, what=what)
    for name in attribute.split("."):
        if not hasattr(value, name):
            raise ValueError(f"{what} is {path!r}, but {module_name!r} has no {attribute!r}")
        value = getattr(value, name)
    return value


def _import(module_name: str, *, path: str, what: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The name is wrong only if the module itself, or a parent package of it, is missing; else the user's import fails.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{what} is {path!r}, but there is no module {error.name!r} on the import path "
            f"(the current folder, that of the configuration, and PYTHONPATH are searched)"
        ) from error


def error_line(error: Exception) -> str:
    """The type of an exception and the first line of its message (some of torch's messages are pages long)."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": ")
