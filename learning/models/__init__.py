"""Models: built by name, from a seed."""

from .statistics import use_batch_statistics
from .zoo import build, names

__all__ = ["build", "names", "use_batch_statistics"]
