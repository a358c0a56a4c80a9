"""`asyncinfer top`."""
