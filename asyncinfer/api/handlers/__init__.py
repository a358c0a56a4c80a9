"""One file of route handlers for each part of the API."""
