"""`asyncinfer bench`."""
