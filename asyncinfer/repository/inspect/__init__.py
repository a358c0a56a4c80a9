"""Read-only views of the queue: listings, statistics, logs, load and the server itself."""
