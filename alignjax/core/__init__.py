"""Types, protocols and small helpers that every other package may import."""
