"""The commands that list, end, retry and delete jobs."""
