"""HTTP itself: connections, messages, bodies, problems; nothing here knows of jobs."""
