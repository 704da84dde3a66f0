"""Meshes, placement rules and multi-host set-up: where arrays live."""
