"""The configuration of an API process."""

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from asyncinfer.repository.policy import Policy
from asyncinfer.webhooks.config import WebhookConfig

if TYPE_CHECKING:
    from asyncinfer.telemetry.tracing import Tracing


class ApiConfig(Struct, frozen=True, kw_only=True):
    """What one API process is started with."""

    redis_url: str
    queue_name: str = "predict_queue"
    policy: Policy = Policy()
    default_model: str | None = None
    own_worker_since_ms: int | None = None
    """When `serve` started its own worker; None without one."""
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    """Host headers accepted beside localhost and `host`; `*` accepts all."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://app.example.com`) that may change state, beside the server's own."""
    api_keys: Path | None = None
    api_keys_stable_seconds: float = 1.0
    """How long the file must be unchanged before its content is used."""
    max_body_bytes: int = 16 << 20
    max_json_bytes: int = 2 << 20
    max_ttl_seconds: int = 7 * 24 * 3600
    """The longest `ttl_seconds` that a job may ask for."""
    max_inflight_bytes: int = 128 << 20
    """For all large bodies together; if the limit of one body is larger, that counts instead."""
    room_wait_seconds: float = 5.0
    """How long a large body, of a request or an answer, may wait for room in
    `max_inflight_bytes`."""
    max_header_bytes: int = 32 << 10
    header_timeout_seconds: float = 10.0
    body_timeout_seconds: float = 30.0
    unready_after_seconds: float = 5.0
    """How long Redis may not answer before the API is not ready."""
    access_log: bool = False
    max_streams: int = 400
    """Event streams at a time; below `max_connections`, so that other requests find a place."""
    heartbeat_seconds: float = 15.0
    """How long a stream may be silent before it sends a comment; proxies close silent streams."""
    express: bool = True
    """Whether a usual submit is answered without a task."""
    max_connections: int = 900
    """Below the usual limit of 1,024 open files; a waiting client holds one."""
    webhooks: WebhookConfig = WebhookConfig()
    tracing: "Tracing | None" = None
    """Records the spans of submits; None: there are none. The server closes it at its end."""

    @property
    def has_short_way(self) -> bool:
        """Whether usual submits are answered without a task: not if each request is to be logged or
        traced, which the ordinary way does."""
        return self.express and not self.access_log and self.tracing is None
