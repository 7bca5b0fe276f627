"""Images, models and their cards, for use elsewhere."""
