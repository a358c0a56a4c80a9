"""Faults that are planted in a copy of the package, to see that tests notice them."""
