"""Kernels for layers with few active weights and activations: direct C++ ones, and torch's own CSR products."""
