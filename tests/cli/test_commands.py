"""Each command does what it says on a real service, for people and for programs."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from asyncinfer import api_keys
from asyncinfer.processes import valkey
from asyncinfer.testing import service
from tests.cli.command_line import CommandResult, error_line, run_command, run_in_shell
from tests.faults.harness import eventually_sync
from tests.faults.proxy import proxied

from .pseudo_terminal import at_a_terminal
from .submitted_jobs import submit, wait_until_ended

ONE_OF_MANY = re.compile(r"\b1 (rows|slots|connections|jobs|workers)\b")
NO_SERVER = "http://127.0.0.1:1"


@contextmanager
def paused(model: str) -> Iterator[None]:
    run_command("pause", model)
    try:
        yield
    finally:
        run_command("resume", model)


# --- jobs ------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_and_filtered(url: str) -> None:
    first = wait_until_ended(url, submit(url))
    second = wait_until_ended(url, submit(url))

    lines = run_command("jobs", "--status", "completed").out.splitlines()
    found = run_command("jobs", "--limit", "2", "--json").json

    assert lines[0].split() == ["JOB", "STATUS", "MODEL", "CREATED", "TOOK", "REASON"]
    assert [line.split()[0] for line in lines[1:3]] == [second, first]
    assert [entry["job_id"] for entry in found] == [second, first]
    assert run_command("jobs", "--status", "failed", "--json").json == []


def test_a_job_is_shown_with_its_result(url: str) -> None:
    job_id = wait_until_ended(url, submit(url))

    shown = run_command("job", job_id)

    assert shown.code == 0
    assert '"class_name":"setosa"' in shown.out
    assert run_command("job", job_id, "--json").json["result"]["class_name"] == "setosa"


def test_the_timeline_of_a_job_is_shown_to_people_and_programs(url: str) -> None:
    job_id = wait_until_ended(url, submit(url))
    shown = run_command("job", job_id, "--timeline").out.splitlines()
    program = run_command("job", job_id, "--timeline", "--json").json
    names = [event["event"] for event in program["events"]]
    assert names == ["submitted", "claimed", "running", "finished"]
    for event, line in zip(program["events"], shown[1:], strict=True):
        assert line.startswith(event["at"][:23])
        assert event["event"] in line
    assert "1 row, version 1, sha256" in shown[3]


def test_a_job_is_watched_until_its_end(url: str) -> None:
    ran = run_command("job", submit(url), "--watch", "--json")

    assert (ran.code, ran.json["status"]) == (0, "completed")
    assert ran.err.splitlines()[-1] == "completed"


def test_a_waiting_job_is_shown_with_its_place_in_the_queue(url: str) -> None:
    with paused("digits"):
        submit(url, "digits")
        ran = run_command("job", submit(url, "digits"))
        run_command("cancel", "--model", "digits")

    assert re.search(r"^position +1 job ahead$", ran.out, re.MULTILINE), ran.out
    assert "eta_seconds" not in ran.out, "of a paused model"


def test_a_watch_ends_at_its_timeout(url: str) -> None:
    with paused("digits"):
        ran = run_command("job", submit(url, "digits"), "--watch", "--timeout", "0.2")
        run_command("cancel", "--model", "digits")

    assert ran.code == 4
    assert "pending" in ran.out


def test_a_job_is_cancelled_retried_and_purged(url: str) -> None:
    with paused("digits"):
        job_id = submit(url, "digits")

        assert run_command("cancel", job_id).out == "1 cancelled.\n"
        assert run_command("job", job_id).code == 1
        assert run_command("retry", job_id).out == "1 retried.\n"
        assert run_command("job", job_id, "--json").json["round"] == 2
    wait_until_ended(url, job_id)
    assert run_command("purge", job_id).out == "1 purged.\n"
    assert "no job with this id" in error_line(run_command("job", job_id), 1)


def test_all_jobs_that_match_are_cancelled_retried_and_purged(url: str) -> None:
    with paused("digits"):
        made = {submit(url, "digits") for _ in range(3)}
        assert run_command("cancel", "--model", "digits", "--json").json["cancelled"] == 3
        found = run_command("retry", "--status", "cancelled", "--model", "digits", "--json").json
        assert made <= set(found["retried"])
    for job_id in found["retried"]:
        wait_until_ended(url, job_id)
    purged = run_command("purge", "--status", "ended", "--model", "digits", "--yes", "--json").json
    assert purged["purged"] >= 3
    assert run_command("jobs", "--model", "digits", "--json").json == []


def test_a_job_that_is_refused_stops_no_other(url: str) -> None:
    with paused("digits"):
        job_id = submit(url, "digits")
        ran = run_command("cancel", "no-such-job", job_id)

    assert (ran.code, ran.out) == (1, "1 cancelled.\n")
    assert ran.err.startswith("asyncinfer: no-such-job: There is no job")


def test_a_command_on_jobs_without_ids_and_filters_is_refused(url: str) -> None:
    for verb in ("cancel", "retry", "purge"):
        message = error_line(run_command(verb), 2)
        assert f"Say which jobs to {verb}" in message


@pytest.mark.parametrize("selection", [("--status", "ended"), ("--model", "digits"), ("--dead",)])
def test_a_purge_by_filter_in_a_script_needs_a_yes(
    url: str, tmp_path: Path, selection: tuple[str, ...]
) -> None:
    job_id = wait_until_ended(url, submit(url, "digits"))
    closed = run_in_shell(f"asyncinfer purge {' '.join(selection)} <&-", tmp_path)
    for ran in (run_command("purge", *selection), closed):
        assert "add --yes. Nothing was deleted." in error_line(ran, 2)
    assert run_command("job", job_id).code == 0


def test_a_purge_on_a_terminal_says_how_many_jobs_it_would_delete(url: str) -> None:
    run_command("purge", "--model", "digits", "--yes")
    jobs = [wait_until_ended(url, submit(url, "digits")) for _ in range(2)]
    for typed, left in (("n\n", 2), ("y\n", 0)):
        shown = at_a_terminal(["purge", "--model", "digits"], 100, typed=typed, until="[y/N]")
        assert "Delete 2 jobs and their results? [y/N]" in shown.text
        listed = run_command("jobs", "--model", "digits", "--json").json
        assert len(listed) == left, jobs
    assert "No such jobs." in at_a_terminal(["purge", "--model", "digits"], 100).text


def test_dead_letters_are_listed(url: str) -> None:
    assert run_command("dead").out.split()[:2] == ["JOB", "STATUS"]
    assert run_command("dead", "--json").json == []
    assert run_command("retry", "--dead").out == "No jobs.\n"


# --- models ----------------------------------------------------------------------------------


def test_models_are_listed_and_shown(url: str) -> None:
    lines = run_command("models").out.splitlines()

    assert [line.split()[0] for line in lines] == ["MODEL", "digits", "iris"]
    assert [entry["model"] for entry in run_command("models", "--json").json["models"]] == [
        "digits",
        "iris",
    ]
    assert "setosa, versicolor, virginica" in run_command("models", "iris").out
    assert run_command("models", "iris", "--json").json["default"] is True


def test_a_model_is_described_in_words_that_fit(url: str) -> None:
    wait_until_ended(url, submit(url))
    eventually_sync(lambda: "run on" in run_command("models", "iris").out, "a run is announced")

    shown = run_command("models", "iris").out
    assert re.search(r"^batched +yes: probe rows ", shown, re.MULTILINE)
    assert re.search(r"^run on .* 1 row ", shown, re.MULTILINE)
    assert not ONE_OF_MANY.search(shown)


def test_the_example_that_a_model_shows_works(url: str) -> None:
    line = next(
        line for line in run_command("models", "iris").out.splitlines() if "example" in line
    )
    row = line.partition("'")[2].rpartition("'")[0]

    ran = run_command("predict", "--model", "iris", row)
    assert ran.code == 0, ran
    assert any(label in ran.out for label in ("setosa", "versicolor", "virginica")), ran.out


def test_a_model_is_paused_and_resumed(url: str) -> None:
    assert "runs none" in run_command("pause", "digits").out
    assert "paused" in run_command("models").out
    assert run_command("resume", "digits", "--json").json == {"model": "digits", "paused": False}
    assert "paused" not in run_command("models").out


# --- top, bench, doctor ----------------------------------------------------------------------


def test_top_shows_queues_and_workers(url: str) -> None:
    wait_until_ended(url, submit(url))

    shown = run_command("top").out
    found = run_command("top", "--once", "--json").json

    assert all(word in shown for word in ("MODEL", "iris", "WORKER", "ready", "RUN p50 p95"))
    iris = next(entry for entry in found["queues"] if entry["model"] == "iris")
    assert iris["run_seconds"]["p50"] >= 0
    assert found["workers"][0]["state"] == "ready"
    assert datetime.fromisoformat(found["at"]).utcoffset() == timedelta()


def test_top_looks_at_redis_itself_where_no_api_answers(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCINFER_URL", NO_SERVER)
    redis_url = valkey.running_url(data_dir)
    assert redis_url

    found = run_command("top", "--redis", redis_url, "--once", "--json").json

    assert [entry["state"] for entry in found["workers"]] == ["ready"]


@pytest.mark.soak
def test_bench_reports_rates_and_a_bottleneck_and_leaves_no_jobs(url: str) -> None:
    before = run_command("jobs", "--limit", "10000", "--json").json
    found = run_command("bench", "--seconds", "0.5", "--connections", "4", "--json")

    assert found.code == 0
    for load in (found.json["waits"], found.json["submits"]):
        assert load["per_second"] > 0
        assert 0 < load["latency_ms"]["p50"] <= load["latency_ms"]["p99"]
    assert found.json["verdict"]["change"]
    assert run_command("jobs", "--limit", "10000", "--json").json == before


async def test_a_bench_whose_connections_are_cut_says_so_in_one_line(
    url: str, tmp_path: Path
) -> None:
    async with proxied(url) as proxy:
        proxy.cut_reply_to(b"POST /predict", times=100)
        command = f"python -m asyncinfer bench --seconds 0.5 --url http://127.0.0.1:{proxy.port}"
        ran = await asyncio.to_thread(run_in_shell, command, tmp_path)
    assert "was cut while it was under load" in error_line(ran, 3)


@pytest.mark.soak
def test_bench_is_shown_to_people(url: str) -> None:
    shown = run_command("bench", "--seconds", "0.5", "--connections", "1").out
    assert not ONE_OF_MANY.search(shown)

    assert all(word in shown for word in ("PER SECOND", "waits", "submits", "limited by"))


def test_the_doctor_finds_no_problem_in_a_running_service(data_dir: Path, url: str) -> None:
    ran = run_command("doctor", "--data-dir", str(data_dir), "--json")

    verdicts = {entry["about"]: entry["verdict"] for entry in ran.json["findings"]}
    assert ran.code == 0, ran.out
    for about in ("Redis", "Redis persistence", "Redis round trip", "clock", "workers", "API"):
        assert verdicts[about] == "ok", ran.out
    assert verdicts["model iris/1"] == "ok"


# --- what operators did ----------------------------------------------------------------------


def test_what_commands_do_to_many_jobs_and_to_models_is_listed(url: str) -> None:
    run_command("purge", "--status", "ended", "--model", "digits", "--yes")
    with paused("digits"):
        submit(url, "digits")
        run_command("cancel", "--model", "digits")
    run_command("retry", "no-such-job")
    run_command("purge", "--status", "ended", "--model", "digits", "--yes")

    found = run_command("audit", "--limit", "5", "--json").json
    lines = run_command("audit", "--limit", "5").out.splitlines()
    pauses = run_command("audit", "--action", "pause", "--tenant", "default", "--json").json

    assert [(entry["action"], entry["jobs"]) for entry in found] == [
        *(("purge", 1), ("retry", 0), ("resume", None), ("cancel", 1), ("pause", None)),
    ]
    heads = ["TIME", "ACTION", "TENANT", "KEY", "FILTER", "JOBS", "OUTCOME"]
    assert lines[0].split() == heads
    cells = ["purge", "default", "-", "tenant=default", "status=ended", "model=digits", "1", "done"]
    assert lines[1].split()[1:] == cells
    assert lines[1].split()[0].endswith("Z")
    assert {entry["action"] for entry in pauses} == {"pause"}
    assert run_command("audit", "--tenant", "nobody").err == "No such entries.\n"
    run_command("retry", "--dead")
    assert "dead=true" in run_command("audit", "--limit", "1").out


# --- keys ------------------------------------------------------------------------------------


def test_a_key_is_made_for_programs_too() -> None:
    made = run_command("keygen", "--json").json

    assert made["key"].startswith("ai_")
    assert made["line"].startswith("default submit,read ")


def test_an_operators_key_is_made_by_its_scope() -> None:
    made = run_command("keygen", "--tenant", "ops", "--scopes", "operator,admin", "--json").json

    assert made["line"].startswith("ops admin,operator ")


def test_jobs_of_all_tenants_are_listed_and_acted_on_by_operators(url: str) -> None:
    job_id = wait_until_ended(url, submit(url))

    shown = run_command("jobs", "--all-tenants", "--limit", "5").out
    job = run_command("job", job_id, "--tenant", "default", "--json").json

    assert "TENANT" in shown
    assert "TENANT" not in run_command("jobs", "--limit", "5").out
    assert (job["tenant"], job["status"], "result" in job) == ("default", "completed", False)
    assert run_command("job", job_id, "--tenant", "acme").code == 1
    assert run_command("dead", "--all-tenants", "--json").json == []
    assert run_command("retry", job_id, "--tenant", "acme", "--json").json["retried"] == []
    assert run_command("cancel", "--all-tenants", "--model", "digits").code == 0
    assert run_command("purge", job_id, "--tenant", "default", "--json").json["purged"] == [job_id]
    refused = run_command("jobs", "--tenant", "acme", "--all-tenants")
    assert "not both" in refused.err
    assert refused.code == 2


@pytest.mark.soak
def test_a_key_that_may_not_see_workers_still_watches_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(api_keys.entry_of("user", "acme", "submit,read").line())
    with service(api_keys=tmp_path / "keys") as locked:
        monkeypatch.setenv("ASYNCINFER_URL", locked.url)
        monkeypatch.setenv("ASYNCINFER_API_KEY", "user")
        shown = run_command("top")
        found = run_command("top", "--once", "--json").json
        measured = run_command("bench", "--seconds", "0.5", "--connections", "2", "--json")
        examined = run_command("doctor", "--url", locked.url, "--api-key", "guess").out

    assert shown.code == 0
    assert "workers are shown to keys with the scope admin" in shown.out
    assert found["workers"] is None
    assert (measured.code, measured.json["sides"]["slots_busy"]) == (0, None)
    assert [entry["model"] for entry in found["queues"]]
    assert f"answers at {locked.url}" in examined


# --- failures --------------------------------------------------------------------------------

COMMANDS = (
    ("predict", "1", "2", "3", "4"),
    ("jobs",),
    ("job", "x"),
    ("dead",),
    ("cancel", "x"),
    ("retry", "x"),
    ("purge", "x"),
    ("models",),
    ("pause", "iris"),
    ("resume", "iris"),
    ("audit",),
    ("top",),
    ("bench", "--seconds", "0.5"),
)


def command_name(argv: tuple[str, ...]) -> str:
    return argv[0]


@pytest.mark.parametrize("argv", COMMANDS, ids=command_name)
def test_a_server_that_is_down_is_one_line(argv: tuple[str, ...]) -> None:
    message = error_line(run_command(*argv, "--url", NO_SERVER), 3)

    assert NO_SERVER in message
    assert "asyncinfer serve" in message
    assert "--url" in message


@pytest.mark.parametrize("argv", COMMANDS, ids=command_name)
def test_a_wrong_url_is_one_line(argv: tuple[str, ...]) -> None:
    assert "http://" in error_line(run_command(*argv, "--url", "nonsense"), 2)


def test_another_program_is_not_taken_for_a_server(url: str) -> None:
    class OtherProgram(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Hello</html>")

        def log_message(self, *_: object) -> None:
            """Prints nothing to the terminal."""

    with HTTPServer(("127.0.0.1", 0), OtherProgram) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        other = f"http://127.0.0.1:{server.server_port}"
        line = error_line(run_command("jobs", "--url", other), 3)
        server.shutdown()
        thread.join()
    assert other in line
    assert "asyncinfer serve" in line

    wrong_path = error_line(run_command("jobs", "--url", f"{url}/docs"), 1)
    assert "Give --url the server's address alone" in wrong_path


def test_an_unknown_model_is_one_line(url: str) -> None:
    for argv in (("pause", "nope"), ("models", "nope"), ("bench", "--model", "nope")):
        assert "Known: `digits`, `iris`" in error_line(run_command(*argv), 1)


def test_json_is_json_to_the_last_byte(url: str) -> None:
    argvs = (("models",), ("jobs",), ("dead",), ("audit",), ("top", "--once"), ("pause", "iris"))
    for argv in (*argvs, ("resume", "iris")):
        ran: CommandResult = run_command(*argv, "--json")
        assert (ran.code, ran.err) == (0, "")
        json.loads(ran.out)
