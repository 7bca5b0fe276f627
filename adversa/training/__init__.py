"""How every network here is trained: the one loop, its schedules, its processes."""
