"""The commands `serve`, `work` and `keygen`."""
