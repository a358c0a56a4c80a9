"""Many jobs in one NDJSON request, answered line by line while it is read."""
