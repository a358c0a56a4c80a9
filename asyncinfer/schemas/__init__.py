"""What travels over HTTP: requests, responses, problems."""
