"""Deciding which synthetic images may enter training, and saying why not."""
