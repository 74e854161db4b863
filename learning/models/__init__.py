"""Models, built by name from a seed."""

from .zoo import build, names, use_batch_statistics

__all__ = ["build", "names", "use_batch_statistics"]
