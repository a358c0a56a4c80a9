"""The command `webhooks` lists the hosts that fail, and sends to them again."""

from asyncinfer.client import Client
from tests.cli.command_line import error_line, run_command
from tests.faults.harness import eventually_sync

HOST = "hook.invalid:8443"
ROW = [[5.1, 3.5, 1.4, 0.2]]


def test_a_host_that_fails_is_listed_and_sent_to_again(url: str) -> None:
    with Client(url) as client:
        job = client.submit(ROW, webhook={"url": f"https://{HOST}/in", "metadata": {"n": 1}}).wait()
        eventually_sync(lambda: bool(job.webhook().deliveries[0].attempts), "a try has failed")
        (listed,) = run_command("webhooks", "--host", HOST, "--json").json
        assert (listed["host"], listed["pending"], listed["failing"]) == (HOST, 1, 1)
        assert listed["last_error"]
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


def test_what_is_sent_again_must_be_said(url: str) -> None:
    for arguments in (("--redeliver",), ("--given-up",), ("--model", "iris")):
        message = error_line(run_command("webhooks", *arguments), 2)
        assert "--redeliver" in message or "--host" in message
