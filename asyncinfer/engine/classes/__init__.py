"""Which outputs of a classifier are its scores and its class."""
