"""`asyncinfer predict`."""
