"""Losses as functions on arrays; none knows a model."""

FORMS = ("auto", "gather", "ring", "hierarchical")  # how a loss over all pairs is computed: see choice.py
