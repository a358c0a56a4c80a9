"""What follows a job until it ends: completion notices, change feed, waiting."""
