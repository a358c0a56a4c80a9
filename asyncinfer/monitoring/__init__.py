"""Metrics in the text format of Prometheus, and the private port that answers with them."""
