"""What a run will take: placement, memory, time."""
