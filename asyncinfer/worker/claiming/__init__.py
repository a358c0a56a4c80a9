"""Claiming jobs: which queues, when, and how many at once."""
