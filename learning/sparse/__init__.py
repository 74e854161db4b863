"""Sparse products with dense weights: layers, thresholds, and kernels (ZeroFL)."""
