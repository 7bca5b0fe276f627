"""What several packages need: small functions without a subject of their own."""
