"""Benchmarks and the rules they are scored by."""
