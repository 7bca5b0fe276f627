"""How good a classifier is, how sure that is, and whether one is better than another."""
