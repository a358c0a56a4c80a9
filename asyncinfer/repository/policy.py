"""How long jobs are kept and how much a queue takes."""

from msgspec import Struct


class Policy(Struct, frozen=True, kw_only=True):
    """What the scripts enforce; the same for every process on one Redis."""

    job_ttl_seconds: int = 3600
    failed_ttl_seconds: int = 24 * 3600
    keep_input: bool = False
    max_queue: int = 100_000
    max_queue_bytes: int = 1 << 30
    lease_seconds: float = 15.0
    reap_seconds: float = 2.0
    max_deliveries: int = 3
    max_errors: int = 3
    max_dead: int = 10_000
    log_jobs: int = 100_000

    @property
    def lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)

    @property
    def tick_ms(self) -> int:
        """How often a sweep is due; near lease / 2 the outage guard would re-arm for ever."""
        return max(1, int(1000 * min(self.reap_seconds, self.lease_seconds / 6)))

    @property
    def idempotency_seconds(self) -> int:
        return max(24 * 3600, self.job_ttl_seconds)

    def ending(self) -> dict[str, int | bool]:
        """What a script must know to end a job."""
        return {
            "ttl_seconds": self.job_ttl_seconds,
            "failed_ttl_seconds": self.failed_ttl_seconds,
            "keep_input": self.keep_input,
            "max_dead_letters": self.max_dead,
        }

    def room(self) -> dict[str, int]:
        """What a script must know to refuse a job."""
        return {
            "max_queue": self.max_queue,
            "max_bytes": self.max_queue_bytes,
            "idempotency_ttl_seconds": self.idempotency_seconds,
        }
