"""What the API is given to run with."""

from pathlib import Path

from msgspec import Struct

from asyncinfer.repository.policy import Policy


class ApiConfig(Struct, frozen=True, kw_only=True):
    redis_url: str
    queue_name: str = "predict_queue"
    policy: Policy = Policy()
    default_model: str | None = None
    own_worker_since_ms: int | None = None
    """A worker of its own is being started since then; None: there is none."""
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    """Host headers taken beside localhost and `host`; `*` takes all."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://app.example.com`) that may change state beside our own."""
    api_keys: Path | None = None
    api_keys_stable_seconds: float = 1.0
    """For how long the file must have been the same before it counts."""
    max_body_bytes: int = 16 << 20
    max_json_bytes: int = 2 << 20
    max_header_bytes: int = 32 << 10
    header_timeout_seconds: float = 10.0
    body_timeout_seconds: float = 30.0
    max_streams: int = 400
    """Clients told of changes at once; below `max_connections`, so that others find room."""
    heartbeat_seconds: float = 15.0
    """After how much silence a stream shows that it lives; proxies end what is silent."""
    max_connections: int = 900
    """Below the usual limit of 1,024 open files; a waiting client holds one."""
