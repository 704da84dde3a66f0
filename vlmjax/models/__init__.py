"""Linen modules: how a forward pass computes."""
