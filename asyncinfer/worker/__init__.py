"""The worker: claims jobs, runs them in threads, and stores their outcomes."""
