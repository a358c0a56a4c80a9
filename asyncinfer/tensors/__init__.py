"""Tensors without a model: datatypes, packed bytes, and what can be wrong with an array."""
