"""A benchmark of this service and the plain pattern, on one machine and in one run."""
