"""Losses as functions on arrays."""
