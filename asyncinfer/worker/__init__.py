"""The worker: claims jobs, runs them in threads, stores what became of them."""
