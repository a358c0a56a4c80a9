"""This service beside the plain pattern, on one machine, in one run."""
