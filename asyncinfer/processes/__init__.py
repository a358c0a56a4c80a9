"""Processes and their resources: children, supervisor, embedded Valkey, CPUs, tuning."""
