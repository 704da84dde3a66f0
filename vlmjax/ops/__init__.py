"""Numerics that models share: attention, activations, resize kernels."""
