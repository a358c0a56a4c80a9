"""The conversations with a server, each written once for threads and event loops."""
