"""Import torchvision beside a torch that it was not built for.

torchvision's registry wheel for Linux is built against CUDA. Beside a CPU-only torch its compiled extension cannot be
loaded, and the import then fails, because two operator schemas that it refers to were never declared. Declaring them
first makes models, data sets and transforms work; the two operators themselves (box suppression) stay without a kernel.
Users of small boards meet the same mismatch.
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
    # Cached for its life, not for speed: the declarations go when the Library object is collected.
    return torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


def _extension_loads() -> bool:
    """Whether torchvision's compiled extension loads here; loading it declares its operators. True without torchvision."""
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
    """Declare torchvision's two operators if its own extension cannot; harmless when repeated.

    To be called before code that may import torchvision on its own, such as a user's module.
    """
    # Declaring them first would break a healthy extension, which declares them when it is loaded: so it gets the first
    # turn. Windows finds its libraries by other means, and has no such mismatched wheel.
    if os.name == "nt" or hasattr(torch.ops.torchvision, "nms") or _extension_loads():
        return
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library().define(schema)  # type: ignore[no-untyped-call]


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, imported so that a mismatched build works too. All of our code imports it through here."""
    declare_missing_operators()
    with warnings.catch_warnings():
        # The image extension fails for the same reason as the first; we read images with Pillow.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension", category=UserWarning)
        return importlib.import_module("torchvision")
