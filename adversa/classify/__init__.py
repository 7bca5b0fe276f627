"""The classifier that is made better: a timm model by name, fitted, scored and loaded from a
folder.
"""
