"""The run folder: steps, lock, requested state, tracking."""
