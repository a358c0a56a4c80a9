"""The paths of health probes, which are answered even when other requests are refused."""

from typing import Final

HEALTH_PATHS: Final = frozenset({"/health", "/health/live", "/health/ready"})
"""What kubelets and load balancers request; a test compares them with the route table."""
