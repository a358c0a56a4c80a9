"""The paths of health probes, which are answered also where other requests are turned away."""

from typing import Final

HEALTH_PATHS: Final = frozenset({"/health", "/health/live", "/health/ready"})
"""What kubelets and load balancers request; a test compares them with the route table."""
