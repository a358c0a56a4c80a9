"""The policy: how long jobs are kept and how much a queue holds."""

from msgspec import Struct


class Policy(Struct, frozen=True, kw_only=True):
    """Limits that the scripts enforce; they must be equal for every process on one Redis."""

    job_ttl_seconds: int = 3600
    failed_ttl_seconds: int = 24 * 3600
    keep_input: bool = False
    max_queue: int = 100_000
    max_queue_bytes: int = 1 << 30
    max_kept_bytes: int = 4 << 30
    max_webhooks: int = 100_000
    max_webhook_bytes: int = 256 << 20
    lease_seconds: float = 15.0
    reap_seconds: float = 2.0
    max_deliveries: int = 3
    max_errors: int = 3
    max_dead_letters: int = 10_000
    max_log_jobs: int = 100_000

    @property
    def lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)

    @property
    def tick_ms(self) -> int:
        """The interval of sweeps. It stays well below lease / 2, near which the outage guard would
        re-arm for ever."""
        return max(1, int(1000 * min(self.reap_seconds, self.lease_seconds / 6)))

    @property
    def idempotency_seconds(self) -> int:
        return max(24 * 3600, self.job_ttl_seconds)

    def end_arguments(self) -> dict[str, int | bool]:
        """The arguments of a script that ends jobs."""
        return {
            "ttl_seconds": self.job_ttl_seconds,
            "failed_ttl_seconds": self.failed_ttl_seconds,
            "keep_input": self.keep_input,
            "max_kept_bytes": self.max_kept_bytes,
            "max_dead_letters": self.max_dead_letters,
        }

    def capacity_arguments(self) -> dict[str, int]:
        """The arguments of a script that takes jobs in, or refuses them if the queue is full."""
        return {
            "max_queue": self.max_queue,
            "max_bytes": self.max_queue_bytes,
            "max_kept_bytes": self.max_kept_bytes,
            "idempotency_ttl_seconds": self.idempotency_seconds,
        }

    def webhook_arguments(self) -> dict[str, int]:
        """More of `capacity_arguments`, for calls with a job that has a webhook."""
        return {"max_webhooks": self.max_webhooks, "max_webhook_bytes": self.max_webhook_bytes}
