"""Image sets from elsewhere: read, map labels, score, report; predictions."""
