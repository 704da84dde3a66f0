"""A run before it runs: compiled for devices that are not here, its memory known and its time estimated."""
