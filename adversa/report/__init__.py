"""One HTML page that says what a run did, read from the run folder alone."""
