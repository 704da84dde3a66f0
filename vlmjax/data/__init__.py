"""From bytes to examples to batches, in numpy only: nothing in here imports jax."""
