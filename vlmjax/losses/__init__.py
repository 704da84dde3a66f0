"""Losses as functions on arrays; none knows a model."""
