"""The loop: its stages, one module a step, arms, ratio, results."""
