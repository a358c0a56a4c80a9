"""The models that this worker has: found, tried, loaded, announced."""
