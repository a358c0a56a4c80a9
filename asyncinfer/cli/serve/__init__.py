"""`asyncinfer serve` and `asyncinfer work`: processes, configuration, banner, log."""
