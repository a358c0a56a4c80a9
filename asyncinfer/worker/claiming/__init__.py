"""Which jobs this worker takes, and when."""
