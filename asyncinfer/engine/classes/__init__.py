"""The outputs of a classifier that are its scores and its class."""
