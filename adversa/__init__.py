"""adversa: find a classifier's hard cases, generate more of them, retrain, and say honestly whether
it helped.
"""

__version__ = "0.1.0"
