"""External cohorts: read, map labels, score, report; predictions."""
