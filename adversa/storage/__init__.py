"""Paths (local and object stores), tables, weights, the hub."""
