"""Which of a tenant's jobs are meant."""

from msgspec import Struct

from asyncinfer.jobs import DEFAULT_TENANT
from asyncinfer.repository.submit import Stored


class Filter(Struct, frozen=True, kw_only=True):
    """A tenant's jobs; None where anything will do."""

    tenant: str
    statuses: frozenset[str] | None = None
    model: str | None = None
    group: str | None = None
    dead: bool = False
    """Only dead letters."""

    @classmethod
    def of(cls, tenant: str, status: str | None, model: str | None) -> "Filter":
        return cls(
            tenant=tenant, statuses=None if status is None else frozenset([status]), model=model
        )

    def matches(self, job: Stored, default_model: str | None) -> bool:
        record = job.record
        owner = record.tenant if record else DEFAULT_TENANT
        model = record.model if record else default_model
        group = record.options.group if record else None
        return (
            (self.statuses is None or job.status in self.statuses)
            and owner == self.tenant
            and self.model in (None, model)
            and self.group in (None, group)
        )
