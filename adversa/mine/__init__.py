"""Finding the real images that the classifier gets wrong, or nearly."""
