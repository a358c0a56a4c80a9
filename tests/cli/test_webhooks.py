"""The command `webhooks` lists the hosts that fail, and sends to them again."""

import re
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from asyncinfer.cli.top import tables
from asyncinfer.cli.top.snapshot import Snapshot
from asyncinfer.client import Client, QueueWebhooks
from tests.cli.command_line import error_line, run_command
from tests.faults.harness import eventually_sync

from .hostile_server import HostileServer, webhook_of

HOST = "hook.invalid:8443"
ROW = [[5.1, 3.5, 1.4, 0.2]]


def test_a_host_that_fails_is_listed_and_sent_to_again(url: str) -> None:
    with Client(url) as client:
        job = client.submit(ROW, webhook={"url": f"https://{HOST}/in", "metadata": {"n": 1}}).wait()
        eventually_sync(lambda: bool(job.webhook().deliveries[0].attempts), "a try has failed")
        (listed,) = run_command("webhooks", "--host", HOST, "--json").json
        assert (listed["host"], listed["pending"], listed["failing"]) == (HOST, 1, 1)
        assert listed["last_error"]
        assert " to come" in line_of_top()
        lines = run_command("webhooks").out.splitlines()
        assert lines[0].split()[:3] == ["HOST", "PENDING", "FAILING"]
        assert any(line.startswith(HOST) for line in lines[1:])
        sent = run_command("webhooks", "--redeliver", "--host", HOST)
        assert (sent.code, sent.out) == (0, "1 sent again.\n")
        eventually_sync(lambda: len(job.webhook().deliveries[0].attempts) == 2, "it was tried")
        job.purge()
        assert run_command("webhooks", "--host", HOST, "--json").json == []


def test_the_end_of_a_group_that_a_host_does_not_take_is_listed_and_sent_again(url: str) -> None:
    host = "group.invalid:8443"
    with Client(url) as client:
        client.submit(ROW, group="hooked").wait()
        group = client.group("hooked").close(webhook=f"https://{host}/in")

        def tries() -> int:
            deliveries = group.webhook().deliveries
            return len(deliveries[0].attempts) if deliveries else 0

        eventually_sync(lambda: tries() == 1, "a try has failed")
        (listed,) = run_command("webhooks", "--host", host, "--json").json
        assert (listed["pending"], listed["failing"]) == (1, 1)
        assert run_command("webhooks", "--redeliver", "--host", host).out == "1 sent again.\n"
        eventually_sync(lambda: tries() == 2, "it was tried")
        assert group.redeliver_webhook().deliveries[0].tries == 0


def webhook_lines(job_id: str) -> list[str]:
    """What `job` says of a webhook."""
    lines = run_command("job", job_id).out.splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith("webhook ")]


def test_a_job_is_shown_with_its_webhook(url: str) -> None:
    with Client(url) as client:
        assert webhook_lines(client.submit(ROW).wait().id) == []
        job = client.submit(ROW, webhook=f"https://{HOST}/job").wait()
        eventually_sync(lambda: bool(job.webhook().deliveries[0].attempts), "a try has failed")
        where, what = webhook_lines(job.id)
        job.purge()
    assert where == f"https://{HOST}/job is told of: completed, failed, cancelled"
    assert re.match("completed, round 1: 1 try failed: .+; next try 20.+Z$", what), what


@pytest.mark.parametrize(
    ("status", "http_status", "text"),
    [
        ("delivered", 204, "delivered after 2 tries, 2026-11-28T19:51:27Z"),
        ("pending", 503, "2 tries failed: HTTP 503; next try 2026-11-28T19:51:27Z"),
        ("given_up", 503, "given up after 2 tries: HTTP 503"),
        ("gone", 410, "given up: the receiver answered that it is gone (HTTP 410)"),
    ],
)
def test_each_end_of_a_delivery_is_said(
    hostile: HostileServer, status: str, http_status: int, text: str
) -> None:
    hostile.answers["GET /webhook"] = webhook_of(status, http_status)
    assert webhook_lines("a")[1] == f"completed, round 1: {text}"


def line_of_top() -> str:
    """What `top` says of webhooks."""
    (line,) = re.findall("^WEBHOOKS .*$", run_command("top").out, re.MULTILINE)
    return str(line)


def test_top_counts_the_webhooks_of_all_queues_in_a_line(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(url) as client:
        queue = client.queues()[0]
    names = ("one", "two")

    def shown(*webhooks: QueueWebhooks) -> str:
        """`top` for queues that have no worker and these webhooks."""
        idle = [
            replace(queue, model=name, workers=0, slots=0, dead=0, webhooks=counts)
            for name, counts in zip(names, webhooks, strict=True)
        ]
        tables.say(Snapshot(datetime.now(UTC), url, idle, None))
        return capsys.readouterr().out

    both = shown(
        QueueWebhooks(pending=1200, due=3, oldest_due_seconds=90.0),
        QueueWebhooks(pending=4, due=1, oldest_due_seconds=2.0, given_up=5),
    )
    line = "WEBHOOKS  1,204 to come, 4 due, oldest 90 s, 5 given up  -> asyncinfer webhooks\n"
    assert line in both
    assert all(f"\n{name} " in both for name in names)
    nothing = shown(QueueWebhooks(), QueueWebhooks(reserved=7))
    assert "WEBHOOKS" not in nothing
    assert not any(f"\n{name} " in nothing for name in names)


def test_what_is_sent_again_must_be_said(url: str) -> None:
    for arguments in (("--redeliver",), ("--given-up",), ("--model", "iris")):
        message = error_line(run_command("webhooks", *arguments), 2)
        assert "--redeliver" in message or "--host" in message
