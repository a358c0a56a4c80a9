"""Closing a group with a client, and maps that close theirs."""

import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import pandas as pd
import pytest

from asyncinfer.client import (
    AsyncClient,
    Client,
    GroupClosed,
    GroupNotFound,
    InvalidInput,
    WebhookNotFound,
    WebhookRefused,
)
from tests.faults.harness import eventually, eventually_sync

SETOSA: Final = [5.1, 3.5, 1.4, 0.2]
URL: Final = "https://receiver.invalid/done"
HOOK: Final = {"url": URL, "metadata": {"order": 7}}


@pytest.fixture
def group() -> str:
    """The name of a group without jobs."""
    return f"closed-{uuid.uuid4().hex}"


def test_a_closed_group_raises_group_closed_and_says_when_it_ended(
    client: Client, group: str
) -> None:
    client.submit([SETOSA], "iris", group=group).wait()
    found = client.group(group)
    assert not found.closed
    found.close()
    assert (found.closed, found.ended_at) == (True, None)
    found.close(webhook=URL)
    eventually_sync(lambda: found.refresh().ended_at is not None, "it has ended")
    with pytest.raises(GroupClosed, match="takes no more jobs"):
        client.submit([SETOSA], "iris", group=group)
    with pytest.raises(GroupClosed, match="another webhook"):
        found.close(webhook={"url": "https://other.invalid/"})
    with pytest.raises(WebhookRefused):
        found.close(webhook={"url": "http://10.0.0.1/"})
    with pytest.raises(GroupNotFound):
        client.request("POST", "/group/none/close")


async def test_an_asynchronous_group_is_closed(aclient: AsyncClient, group: str) -> None:
    await (await aclient.submit([SETOSA], "iris", group=group)).wait()
    found = await aclient.group(group)
    with pytest.raises(WebhookNotFound):
        await found.webhook()
    assert (await found.close(webhook=URL)).closed
    assert (await found.webhook()).url == URL

    async def has_ended() -> bool:
        return (await found.refresh()).ended_at is not None

    await eventually(has_ended, "it has ended")
    assert [one.event for one in (await found.redeliver_webhook()).deliveries] == ["ended"]
    with pytest.raises(GroupClosed):
        await aclient.submit([SETOSA], "iris", group=group)


def lines(rows: list[Any]) -> Iterator[Any]:
    yield from rows


@pytest.mark.parametrize(("form", "batch"), [(list, 1), (list, 256), (lines, 2)])
def test_a_map_closes_its_group_before_it_gives_the_last_result(
    client: Client, group: str, batch: int, form: Callable[[list[Any]], Any]
) -> None:
    rows = [SETOSA] * 7
    mapped = client.map(form(rows), "iris", batch=batch, group=group, webhook=HOOK, progress=False)
    with mapped as results:
        # zip asks for no more results once it has no more rows.
        assert len(list(zip(rows, results, strict=False))) == 7
    assert client.group(group).closed
    eventually_sync(lambda: client.group(group).ended_at is not None, "it has ended")


async def test_an_asynchronous_map_closes_its_group(aclient: AsyncClient, group: str) -> None:
    async def coming() -> AsyncIterator[Any]:
        for _ in range(7):
            yield SETOSA

    results = aclient.map(coming(), "iris", batch=2, group=group, webhook=HOOK, progress=False)
    for _ in range(7):
        await anext(results)
    assert (await aclient.group(group)).closed
    await results.close()


def test_rows_that_fail_are_run_again_before_the_group_is_closed(
    client: Client, group: str
) -> None:
    rows = [[1.0, 2.0, 3.0], [9.0, 9.0, 9.0], [4.0, 5.0, 6.0]]
    options: dict[str, Any] = {"on_error": "return", "group": group, "progress": False}
    results = list(client.map([*rows, "no row"], "doubled", webhook=HOOK, **options))
    assert isinstance(results[3], InvalidInput)
    assert [list(result) for result in results[:3]] == [[2 * x for x in row] for row in rows]
    assert client.group(group).closed


def test_a_map_that_is_left_early_leaves_its_group_open_and_is_resumed(
    client: Client, group: str
) -> None:
    rows = [SETOSA] * 40
    options: dict[str, Any] = {"batch": 1, "in_flight": 1, "group": group, "progress": False}
    with client.map(rows, "iris", webhook=HOOK, **options) as results:
        assert len(list(itertools.islice(results, 3))) == 3
    assert not client.group(group).closed
    assert len(list(client.map(rows, "iris", webhook=HOOK, **options))) == 40
    assert client.group(group).closed
    # The rows have their jobs, so the map may be repeated though the group is closed.
    assert len(list(client.map(rows, "iris", webhook=HOOK, **options))) == 40


def test_a_webhook_that_is_refused_is_raised_behind_the_last_result(
    client: Client, group: str
) -> None:
    refused = "http://10.0.0.1/"
    results = client.map([SETOSA] * 3, "iris", group=group, webhook=refused, progress=False)
    assert len(list(itertools.islice(results, 3))) == 3
    with pytest.raises(WebhookRefused):
        next(results)
    assert not client.group(group).closed


def test_a_frame_may_be_mapped_with_a_webhook(client: Client, group: str) -> None:
    frame = pd.DataFrame([SETOSA] * 3, columns=list("abcd"))
    found = client.map_frame(frame, model="iris", group=group, webhook=HOOK, progress=False)
    assert len(found) == 3
    assert client.group(group).closed
