"""Imports torchvision with a torch build that it was not compiled for.

The torchvision wheel for Linux on PyPI is built against CUDA. With a CPU-only torch its compiled extension cannot be loaded,
and the import fails because two operator schemas that it refers to are not declared. Declaring them first makes models, data
sets and transforms work; the two operators themselves (box suppression) have no kernel. Small boards have the same mismatch.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import warnings
from types import ModuleType

import torch

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@functools.cache
def _library() -> torch.library.Library:
    # Cached to keep it alive: the declarations are removed when the Library object is garbage-collected.
    return torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


def _extension_loads() -> bool:
    """Whether torchvision's compiled extension can be loaded; loading it declares its operators. True without torchvision."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return True
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(package.submodule_search_locations[0], loader).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True


def declare_missing_operators() -> None:
    """Declare torchvision's two operators if its own extension cannot be loaded. Repeated calls have no effect.

    Call it before any code that may import torchvision itself, such as a user's module.
    """
    # Declaring them first would break a working extension, which declares them when it is loaded; so the extension is tried
    # first. Windows finds its libraries differently, and has no mismatched wheel.
    if os.name == "nt" or hasattr(torch.ops.torchvision, "nms") or _extension_loads():
        return
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library().define(schema)  # type: ignore[no-untyped-call]


def import_torchvision() -> ModuleType:
    """Import ``torchvision``, also in a mismatched build. All code of this package imports torchvision by this function."""
    declare_missing_operators()
    with warnings.catch_warnings():
        # The image extension fails to load for the same reason; images are read with Pillow.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension", category=UserWarning)
        return importlib.import_module("torchvision")
