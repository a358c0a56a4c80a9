"""Lists of deliveries: a walk in pages meets each delivery once, whatever becomes of others."""

from typing import Final

import pytest

from asyncinfer.errors import InvalidQuery
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import DeliveryState, Target, pack_state
from asyncinfer.repository.inspect.cursors import encode_cursor
from asyncinfer.repository.inspect.webhooks import DeliveryFilter, WebhookInspection
from asyncinfer.repository.store import Store
from tests.queue_driver import Q, QueueDriver

ALL: Final = DeliveryFilter(tenant=None)
GIVEN_UP: Final = DeliveryFilter(tenant=None, only_given_up=True)


def add(
    hands: QueueDriver, queue: str, count: int, *, is_open: bool, host: str = "a.example"
) -> None:
    """Adds deliveries that fail, or were given up."""
    word = "open" if is_open else "done"
    target = Target(f"https://{host}/", "default").text
    table = keys.outbox(queue) if is_open else keys.undelivered(queue)
    pipeline = hands.redis.pipeline()
    pipeline.sadd(keys.queues(Q), queue)
    for number in range(count):
        job_id = f"{word}-{queue}-{number}"
        state = pack_state(DeliveryState(tries=1))
        pipeline.hset(keys.webhook(queue, job_id), mapping={"target": target, "1_failed": state})
        pipeline.zadd(table, {f"{job_id}_1_failed": number})
    pipeline.execute()


async def walk(inspection: WebhookInspection, wanted: DeliveryFilter) -> tuple[list[str], int]:
    """The names of all deliveries that are found, and the number of pages."""
    names: list[str] = []
    pages, cursor = 0, None
    while pages == 0 or cursor:
        found = await inspection.failing(wanted, 1000, cursor)
        names += (delivery.member.name for delivery in found.deliveries)
        cursor, pages = found.cursor, pages + 1
    return names, pages


async def test_pages_of_deliveries_have_all_of_all_queues_once(
    hands: QueueDriver, store: Store
) -> None:
    other = f"{Q}:digits"
    for queue in (Q, other):
        add(hands, queue, 700, is_open=True)
        add(hands, queue, 50, is_open=False)
    names, pages = await walk(WebhookInspection(store, max_looks=300), ALL)
    assert len(names) == len(set(names)) == 1500
    assert 4 <= pages <= 6
    assert [name.split("-")[0] for name in names[:100]] == ["done"] * 100
    names, _ = await walk(WebhookInspection(store, max_looks=1), GIVEN_UP)
    assert len(set(names)) == 100


async def test_a_delivery_whose_time_changes_between_pages_is_met(
    hands: QueueDriver, store: Store
) -> None:
    add(hands, Q, 900, is_open=True)
    inspection = WebhookInspection(store, max_looks=200)
    first = await inspection.failing(ALL, 1000)
    pipeline = hands.redis.pipeline()
    for number in range(900):
        pipeline.zadd(keys.outbox(Q), {f"open-{Q}-{number}_1_failed": -number})
    pipeline.execute()
    names = {delivery.member.name for delivery in first.deliveries}
    cursor = first.cursor
    while cursor:
        page = await inspection.failing(ALL, 1000, cursor)
        names |= {delivery.member.name for delivery in page.deliveries}
        cursor = page.cursor
    assert len(names) == 900


async def test_hosts_are_listed_in_pages_that_have_all_of_them(
    hands: QueueDriver, store: Store
) -> None:
    for number in range(3):
        add(hands, f"{Q}:m{number}", 300, is_open=True, host=f"h{number}.example")
    inspection = WebhookInspection(store, max_looks=300)
    pending: dict[str, int] = {}
    pages, cursor = 0, None
    while pages == 0 or cursor:
        page = await inspection.hosts("default", cursor)
        for host in page.hosts:
            pending[host.host] = pending.get(host.host, 0) + host.open
        cursor, pages = page.cursor, pages + 1
    assert pending == {f"h{number}.example": 300 for number in range(3)}
    assert pages > 1


async def test_a_cursor_of_another_list_is_refused(store: Store) -> None:
    inspection = WebhookInspection(store)
    for place in ((True, Q, -1), (True, Q, 2.5), (1, Q, 0), (True, Q), "x"):
        with pytest.raises(InvalidQuery):
            await inspection.hosts(None, encode_cursor(place))
    assert (await inspection.hosts(None, encode_cursor((True, "gone", 7)))).hosts == ()
