"""`doctor` reports what is wrong, and how to fix it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from asyncinfer import api_keys
from asyncinfer.cli.doctor.findings import Finding
from asyncinfer.cli.doctor.machine import examine_machine
from asyncinfer.cli.doctor.redis import findings_of
from asyncinfer.processes import valkey
from asyncinfer.processes.memory import usable_bytes
from asyncinfer.repository.inspect.server_info import ServerInfo
from asyncinfer.settings import Settings
from tests import zoo
from tests.cli.command_line import run_command
from tests.faults.harness import eventually_sync
from tests.restricted_user import restricted_user
from tests.serving import running_serve

from .submitted_jobs import submit

HEALTHY = ServerInfo(
    server="Valkey 9.1.0",
    refusal="",
    round_trip_seconds=0.0002,
    clock_ahead_seconds=0.01,
    is_replica=False,
    appends=True,
    appends_when="everysec",
    snapshots=False,
    write_error="",
    used_bytes=1 << 20,
    max_bytes=1 << 30,
    machine_bytes=8 << 30,
    default_model="iris",
    workers=1,
)


@pytest.fixture(autouse=True)
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MODEL_DIR, a folder without a model: a process of its own would try it for each test."""
    folder = tmp_path / "small"
    folder.mkdir()
    monkeypatch.setenv("MODEL_DIR", str(folder))
    return folder


@pytest.fixture
def one_model(model_dir: Path) -> None:
    """One small model in MODEL_DIR."""
    (model_dir / "tiny.onnx").write_bytes(zoo.mlp([3, 2]).SerializeToString())


def finding_about(about: str, **vitals: Any) -> Finding:
    findings = findings_of(msgspec.structs.replace(HEALTHY, **vitals), "redis://h:6379")
    return next(finding for finding in findings if finding.about == about)


def test_a_healthy_server_has_no_problem() -> None:
    findings = list(findings_of(HEALTHY, "redis://h:6379"))

    assert {finding.verdict for finding in findings} == {"ok"}
    assert not any(finding.mend for finding in findings)


@pytest.mark.parametrize(
    ("about", "vitals", "verdict", "mend"),
    [
        ("Redis", {"refusal": "This server evicts keys"}, "problem", "maxmemory-policy noeviction"),
        ("Redis", {"refusal": "This is Redis 6.2"}, "problem", "unset REDIS_URL"),
        ("Redis role", {"is_replica": True}, "problem", "sentinel://"),
        ("Redis persistence", {"appends": False}, "problem", "CONFIG SET appendonly yes"),
        ("Redis persistence", {"appends": False, "snapshots": True}, "warning", "appendonly"),
        ("Redis persistence", {"appends": False, "snapshots": None}, "warning", "appendonly"),
        ("Redis persistence", {"appends_when": "no"}, "warning", "appendfsync everysec"),
        ("Redis disk", {"write_error": "aof_last_write_status is err"}, "problem", "BGSAVE"),
        ("Redis memory", {"used_bytes": 900 << 20}, "problem", "CONFIG SET maxmemory"),
        ("Redis memory", {"max_bytes": 0}, "warning", f"CONFIG SET maxmemory {4 << 30}"),
        ("Redis memory", {"max_bytes": 0, "machine_bytes": 0}, "warning", "maxmemory 2gb"),
        ("Redis memory", {"max_bytes": 0, "used_bytes": 7 << 30}, "problem", "lower JOB_TTL"),
        ("Redis round trip", {"round_trip_seconds": 0.02}, "warning", "latency"),
        ("Redis round trip", {"round_trip_seconds": 0.4}, "problem", "latency"),
        ("clock", {"clock_ahead_seconds": -30.0}, "warning", "set-ntp"),
        ("workers", {"workers": 0}, "warning", "asyncinfer work"),
        ("workers", {"workers": 0, "no_jobs_code": "disk_full"}, "warning", "mend Redis first"),
        ("workers", {"default_is_served": False}, "warning", "DEFAULT_MODEL"),
    ],
)
def test_a_problem_of_redis_is_named_with_its_fix(
    about: str, vitals: dict[str, Any], verdict: str, mend: str
) -> None:
    finding = finding_about(about, **vitals)

    assert finding.verdict == verdict
    assert mend in finding.mend


@pytest.mark.parametrize(
    ("about", "code", "vitals", "mend"),
    [
        ("Redis memory", "storage_full", {"used_bytes": 1 << 30}, "CONFIG SET maxmemory"),
        ("Redis disk", "disk_full", {"write_error": "rdb_last_bgsave_status is err"}, "BGSAVE"),
        ("Redis role", "redis_read_only", {"is_replica": True}, "REDIS_URL"),
        ("Redis jobs", "too_few_replicas", {}, "CONFIG SET min-replicas-to-write 0"),
    ],
)
def test_a_server_that_takes_no_jobs_is_a_problem_with_the_name_of_its_state(
    about: str, code: str, vitals: dict[str, Any], mend: str
) -> None:
    finding = finding_about(about, no_jobs_code=code, no_jobs="it says so", **vitals)
    assert finding.verdict == "problem"
    assert code in finding.found
    assert mend in finding.mend


def test_a_redis_that_lacks_replicas_is_a_problem_of_redis_and_of_the_api(
    url: str, data_dir: Path
) -> None:
    server: Any = redis.Redis.from_url(valkey.running_url(data_dir) or "")
    server.config_set("min-replicas-to-write", "1")
    try:
        done = run_command("doctor", "--url", url, "--data-dir", str(data_dir))
    finally:
        server.config_set("min-replicas-to-write", "0")
        server.close()
    assert done.code == 1
    assert "problem  Redis jobs: too_few_replicas: " in done.out
    assert "CONFIG SET min-replicas-to-write 0" in done.out
    assert "it accepts no jobs: too_few_replicas: " in done.out


def test_a_server_without_persistence_is_a_problem(redis_url: str) -> None:
    ran = run_command("doctor", "--redis-url", redis_url)

    assert ran.code == 1
    assert "problem  Redis persistence: none" in ran.out
    assert "appendonly yes" in ran.out


def test_a_server_that_evicts_is_a_problem(server: redis.Redis, redis_url: str) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    try:
        ran = run_command("doctor", "--redis-url", redis_url)
    finally:
        server.config_set("maxmemory-policy", "noeviction")

    assert ran.code == 1
    assert "CONFIG SET maxmemory-policy noeviction" in ran.out


def test_a_key_that_another_program_wrote_is_a_problem(server: redis.Redis, redis_url: str) -> None:
    """All submits to its queue fail, and listings leave the queue out."""
    server.set("predict_queue", "oops")
    ran = run_command("doctor", "--redis-url", redis_url)

    assert ran.code == 1
    assert "problem  Redis keys: 'predict_queue' is a string and should be a list" in ran.out
    assert "rename or delete" in ran.out


@pytest.fixture
def full_disk(server: redis.Redis) -> Iterator[None]:
    """Makes saves of the server fail: a folder has the name of its file."""
    folder = Path(str(server.config_get("dir")["dir"]))
    if not folder.is_dir():
        pytest.skip("the server's folder is not on this machine")
    blocker = folder / str(server.config_get("dbfilename")["dbfilename"])
    blocker.mkdir()
    server.config_set("save", "3600 1")
    save_and_wait(server, "err")
    yield
    server.config_set("save", "")
    blocker.rmdir()
    save_and_wait(server, "ok")
    blocker.unlink()


def save_and_wait(server: redis.Redis, verdict: str) -> None:
    def has_ended() -> bool:
        info = server.info("persistence")
        return not info["rdb_bgsave_in_progress"] and info["rdb_last_bgsave_status"] == verdict

    server.bgsave()
    eventually_sync(has_ended, f"a save is {verdict}")


def test_a_full_disk_is_reported_as_such_and_not_as_a_server_that_is_away(
    full_disk: None, redis_url: str
) -> None:
    ran = run_command("doctor", "--redis-url", redis_url)

    assert ran.code == 1
    assert "problem  Redis disk: rdb_last_bgsave_status is err" in ran.out
    assert "-> free its disk, then: redis-cli -s /" in ran.out
    assert "start it" not in ran.out


def test_a_redis_that_does_not_answer_is_a_problem() -> None:
    ran = run_command("doctor", "--redis-url", "redis://user:secret@127.0.0.1:1")

    assert ran.code == 1
    assert "problem  Redis: redis://127.0.0.1:1" in ran.out
    assert "secret" not in ran.out + ran.err


def test_nothing_started_yet_is_no_problem(one_model: None) -> None:
    ran = run_command("doctor")

    assert ran.code == 0
    assert "-> asyncinfer serve" in ran.out


def test_a_broken_model_is_named_and_takes_nothing_down(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    content = zoo.mlp([3, 2]).SerializeToString()
    (models / "whole.onnx").write_bytes(content)
    (models / "cut.onnx").write_bytes(content[:-9])

    ran = run_command("doctor", "--model-dir", str(models))

    assert ran.code == 1
    assert "ok       model whole/1: loads and runs" in ran.out
    assert "problem  model cut/1: " in ran.out


@pytest.mark.parametrize(
    ("names", "mend"),
    [("tiny,nope", "set MODELS to some of tiny"), ("nope", "correct MODELS, or MODEL_DIR")],
)
def test_a_missing_name_of_models_is_a_problem(one_model: None, names: str, mend: str) -> None:
    ran = run_command("doctor", "--models", names)

    assert ran.code == 1
    assert "problem  models: MODELS names nope: not there" in ran.out
    assert f"-> {mend}" in ran.out


def test_a_folder_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    assert (
        "problem  models: MODEL_DIR" in run_command("doctor", "--model-dir", f"{tmp_path}/no").out
    )


def test_keys_that_cannot_be_read_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("not a key\n")
    ran = run_command("doctor", "--api-keys", f"{tmp_path}/keys")

    assert ran.code == 1
    assert "problem  API keys" in ran.out
    assert "asyncinfer keygen >>" in ran.out


def test_each_broken_line_of_the_keys_is_a_problem_of_its_own(tmp_path: Path) -> None:
    line = api_keys.entry_of("a", "acme", "read").line()
    (tmp_path / "keys").write_text(f"{line}\nacme read ai_in-the-clear\n{line}\n")
    ran = run_command("doctor", "--api-keys", f"{tmp_path}/keys")

    assert "keys, line 2 lets nobody in" in ran.out
    assert "keys, line 3 lets nobody in" in ran.out
    assert "has 1 keys" in ran.out
    assert "ai_" not in ran.out


def test_a_host_that_is_open_without_keys_is_a_problem() -> None:
    assert "HOST 0.0.0.0 lets everyone in" in run_command("doctor", "--host", "0.0.0.0").out


def test_a_host_that_only_this_machine_reaches_needs_no_keys() -> None:
    found = examine_machine(Settings(host="127.0.0.2"), None)

    assert "API keys" not in [finding.about for finding in found]


def test_more_memory_for_the_embedded_valkey_than_there_is_is_a_warning(tmp_path: Path) -> None:
    def about(max_bytes: int | None) -> list[Finding]:
        found = examine_machine(Settings(embedded_maxmemory=max_bytes), tmp_path)
        return [finding for finding in found if finding.about == "EMBEDDED_MAXMEMORY"]

    (finding,) = about(1 << 50)

    assert finding.verdict == "warning"
    assert finding.mend.startswith(f"EMBEDDED_MAXMEMORY={usable_bytes() // 4}")
    assert about(usable_bytes() // 2) == about(None) == []


def test_more_threads_than_cores_are_a_warning() -> None:
    assert "warning  cores" in run_command("doctor", "--concurrency", "500").out


def test_an_api_that_does_not_answer_at_a_given_url_is_a_problem() -> None:
    ran = run_command("doctor", "--url", "http://127.0.0.1:1")

    assert ran.code == 1
    assert "problem  API: nothing listens at http://127.0.0.1:1" in ran.out


def test_a_paused_model_is_a_warning(url: str, data_dir: Path) -> None:
    run_command("pause", "digits")
    try:
        submit(url, "digits")
        ran = run_command("doctor", "--data-dir", str(data_dir))
    finally:
        run_command("resume", "digits")

    assert "warning  models served: digits: paused; 1 job of digits waits, oldest " in ran.out
    assert "-> asyncinfer resume digits" in ran.out


@pytest.mark.soak
def test_the_doctor_takes_less_than_ten_seconds(url: str, data_dir: Path) -> None:
    started = time.monotonic()
    run_command("doctor", "--data-dir", str(data_dir))

    assert time.monotonic() - started < 10


@pytest.mark.parametrize("text", ["label = 1", "outputs = ['none']", "example = [[1, 2]]"])
def test_a_faulty_model_toml_is_named_as_the_file_to_correct(tmp_path: Path, text: str) -> None:
    toml = zoo.place(tmp_path / "two", "odd", zoo.mlp([3, 2]), toml=text).parents[1]

    findings = run_command("doctor", "--json", "--model-dir", f"{tmp_path}/two").json["findings"]

    (finding,) = (entry for entry in findings if entry["about"].startswith("model odd"))
    assert finding["mend"] == f"correct, replace or remove it: {toml}/model.toml"


def test_a_problem_in_the_model_folder_has_its_own_remedy(
    tmp_path: Path,
) -> None:
    content = zoo.mlp([3, 2]).SerializeToString()
    for name in ("my model.onnx", "iris/1/model.onnx", "iris/latest/model.onnx", "two/1/a.onnx"):
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    (tmp_path / "m/two/1/b.onnx").write_bytes(content)
    (tmp_path / "m/cut.onnx").write_bytes(content[:-9])
    (tmp_path / "m/pointer.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "m/link.onnx").symlink_to("nowhere")
    remedies = {
        "my model/1": "rename it: a model's name is",
        "iris/latest": "rename latest to a whole number",
        "two/1": "give that name to the one to serve",
        "cut/1": "copy or download it again",
        "pointer/1": "run `git lfs pull`",
        "link/1": "repair or remove it",
    }

    with running_serve(MODEL_DIR=f"{tmp_path}/m", DATA_DIR=f"{tmp_path}/data") as serve:
        url = serve.banner["URL"]
        eventually_sync(
            lambda: run_command("models", "--url", url).err.count("worker") == len(remedies),
            "all problems are announced",
        )
        listed = run_command("models", "--url", url).err
        served_found = run_command("doctor", "--json", "--url", url).json["findings"]
    found = run_command("doctor", "--json", "--model-dir", f"{tmp_path}/m").json["findings"]

    for name, remedy in remedies.items():
        (local,) = (entry for entry in found if entry["about"] == f"model {name}")
        (served,) = (entry for entry in served_found if entry["found"].startswith(f"{name}: "))
        assert local["mend"].startswith(remedy)
        assert served["mend"].startswith(remedy)
        assert served["mend"].endswith("workers notice that by themselves")
        assert not any("rename" in entry["found"] for entry in (local, served))
    texts = [f"{entry['about']}: {entry['found']}" for entry in (*found, *served_found)]
    assert not any("iris/latest: iris/latest" in text for text in texts)
    assert "iris/latest: " not in listed


def test_a_right_that_the_redis_user_lacks_is_a_problem(
    server: redis.Redis, redis_url: str
) -> None:
    with restricted_user(server, redis_url, "%R~*", "+@all") as url:
        ran = run_command("doctor", "--redis-url", url)

    assert ran.code == 1
    assert "no permission to use a key that asyncinfer needs (NOPERM)" in ran.out
    assert "-> Give it ~job:* ~QUEUE_NAME* ~{QUEUE_NAME*" in ran.out
    assert "another type" not in ran.out


def test_a_login_that_redis_refuses_is_a_problem_without_the_password(
    server: redis.Redis, redis_url: str
) -> None:
    with restricted_user(server, redis_url) as url:
        ran = run_command("doctor", "--redis-url", url.replace(":pass@", ":secret@"))

    assert ran.code == 1
    assert "Redis refuses the login (invalid username-password pair or user is disabled)" in ran.out
    assert "-> Put user and password into REDIS_URL" in ran.out
    assert "secret" not in ran.out + ran.err
