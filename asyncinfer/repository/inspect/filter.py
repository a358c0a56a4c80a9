"""Which jobs are meant."""

from msgspec import Struct

from asyncinfer.jobs import DEFAULT_TENANT
from asyncinfer.repository.stored_jobs import Stored


class Filter(Struct, frozen=True, kw_only=True):
    """Which jobs are meant; None where anything will do."""

    tenant: str | None
    statuses: frozenset[str] | None = None
    model: str | None = None
    group: str | None = None
    dead: bool = False
    """Only dead letters."""

    @classmethod
    def of(
        cls, tenant: str | None, status: str | None, model: str | None, group: str | None = None
    ) -> "Filter":
        statuses = None if status is None else frozenset([status])
        return cls(tenant=tenant, statuses=statuses, model=model, group=group)

    def matches(self, job: Stored, default_model: str | None) -> bool:
        record = job.record
        owner = record.tenant if record else DEFAULT_TENANT
        model = record.model if record else default_model
        group = record.options.group if record else None
        return (
            (self.statuses is None or job.status in self.statuses)
            and self.tenant in (None, owner)
            and self.model in (None, model)
            and self.group in (None, group)
        )
