"""What kubelets and load balancers ask: answered also where other requests are turned away."""

from typing import Final

from asyncinfer.api.routes import ROUTES

HEALTH_PATHS: Final = frozenset(
    route.path for route in ROUTES if route.path.split("/")[1] == "health"
)
