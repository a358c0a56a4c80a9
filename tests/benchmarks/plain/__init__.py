"""The pattern as it is usually written: what the service is measured against."""
