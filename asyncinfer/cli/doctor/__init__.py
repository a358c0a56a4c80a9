"""`asyncinfer doctor`."""
