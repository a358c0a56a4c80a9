"""Completion notices, the change feed, and waiting for jobs."""
