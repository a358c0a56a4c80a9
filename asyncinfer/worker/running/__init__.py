"""Running what was claimed, and storing the outcome."""
