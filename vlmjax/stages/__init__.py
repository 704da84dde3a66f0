"""Train steps: what is learned. One file per stage."""
