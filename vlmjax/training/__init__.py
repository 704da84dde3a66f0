"""The loop around a stage: when things happen."""
