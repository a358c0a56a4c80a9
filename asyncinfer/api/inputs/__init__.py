"""The way from the body of a request to the job that is stored."""
