"""What several of the core packages need, written once."""
