"""Images on demand, regeneration by id, the generation benchmark."""
