"""The plain pattern: an asynchronous inference service as it is usually written."""
