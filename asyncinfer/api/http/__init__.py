"""HTTP without jobs: connections, messages, bodies and problems."""
