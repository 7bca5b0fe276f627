"""The cycle: steps from folders to a folder, run by an engine. Nothing here imports ray."""
