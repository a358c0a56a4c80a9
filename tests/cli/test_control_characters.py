"""Control characters in text of a model, an external job or a server never reach the terminal."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from onnx import TensorProto, helper

from asyncinfer.processes import valkey
from asyncinfer.testing import Running, service
from tests.cli.command_line import run_in_shell
from tests.sampling import soak_except

from .hostile_server import HostileServer
from .pseudo_terminal import at_a_terminal

EVIL: Final = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202eevil\u2066\u2028\x7f[bold]x[/]"
SHOWN: Final = r"\x1b]0;title\x07\x1b[31mred\x9b2J\u202eevil\u2066\u2028\x7f[bold]x[/]"
UNSAFE: Final = ("\x1b]", "\x1b[31mred", "\x07", "\x9b", "\u202e", "\u2066", "\u2028", "\x7f")
COLUMNS: Final = 400


@pytest.fixture(scope="module")
def evil_service() -> Iterator[Running]:
    """A service whose model returns its input, and has control characters in its description."""
    texts = [helper.make_tensor_value_info(name, TensorProto.STRING, ["batch", 1]) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "same", texts[:1], texts[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model.doc_string = EVIL
    with service(models={"same": model}) as running:
        yield running


@pytest.fixture
def evil_url(evil_service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCINFER_URL", evil_service.url)


@pytest.fixture
def redis_client(evil_service: Running) -> Iterator[Any]:
    """The Redis of the service."""
    match = re.search("embedded; its data in (.+)", evil_service.log)
    assert match
    url = valkey.running_url(Path(match[1]))
    assert url
    with redis.Redis.from_url(url, decode_responses=True) as client:
        yield client


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in.json"
    path.write_text(json.dumps([[EVIL]]))
    return path


def shown_on_a_terminal(*argv: str, typed: str = "", until: str = "") -> str:
    text = at_a_terminal(argv, COLUMNS, typed=typed, until=until).text
    for unsafe in UNSAFE:
        assert unsafe not in text, repr(text)
    assert "Traceback" not in text
    return text


@pytest.mark.soak
@pytest.mark.parametrize("form", ["table", "csv"])
def test_an_answer_on_a_terminal_shows_control_characters_as_escapes(
    evil_url: None, rows: Path, form: str
) -> None:
    assert SHOWN in shown_on_a_terminal("predict", str(rows), "--model", "same", "--to", form)


@pytest.mark.soak
@pytest.mark.parametrize("form", ["json", "ndjson"])
def test_json_on_a_terminal_has_escapes_and_means_the_same(
    evil_url: None, rows: Path, form: str
) -> None:
    text = shown_on_a_terminal("predict", str(rows), "--model", "same", "--to", form)
    (line,) = (line for line in text.splitlines() if "evil" in line)
    assert EVIL in str(json.loads(line)["y"][0])


@pytest.mark.soak
@pytest.mark.parametrize("form", ["csv", "json", "ndjson"])
def test_data_in_a_pipe_has_each_character_as_it_is(
    evil_url: None, rows: Path, tmp_path: Path, form: str
) -> None:
    ran = run_in_shell(f"asyncinfer predict {rows} --model same --to {form}", tmp_path)
    assert ran.code == 0
    inner = EVIL if form == "csv" else json.dumps(EVIL, ensure_ascii=False)[1:-1]
    assert inner in ran.out


@pytest.mark.soak
def test_a_description_of_a_model_commands_nothing(evil_url: None, tmp_path: Path) -> None:
    assert SHOWN in shown_on_a_terminal("models", "same")
    assert EVIL in run_in_shell("asyncinfer models same --json", tmp_path).json["description"]


@pytest.mark.soak
def test_status_and_error_of_an_external_job_command_nothing(
    evil_url: None, redis_client: Any
) -> None:
    redis_client.set("job:external1:status", EVIL)
    redis_client.set("job:external2:status", "failed")
    redis_client.set("job:external2:error", json.dumps({"code": "x", "message": EVIL}))

    assert SHOWN in shown_on_a_terminal("job", "external1")
    assert "evil" in shown_on_a_terminal("job", "external2")
    assert "evil" in shown_on_a_terminal("job", "external2", "--json")


@pytest.mark.soak
def test_a_queues_name_commands_nothing_in_top(evil_url: None, redis_client: Any) -> None:
    (key,) = redis_client.keys("{*}:queues")
    queue = f"{key[1 : key.index('}')]}:{EVIL}"
    redis_client.sadd(key, queue)
    redis_client.lpush(queue, "x")
    try:
        assert SHOWN in shown_on_a_terminal("top", "--once")
        assert "evil" in shown_on_a_terminal("top", typed="q", until="evil")
    finally:
        redis_client.srem(key, queue)
        redis_client.delete(queue)


EVIL_PROBLEM: Final = {"model": EVIL, "version": EVIL, "worker": EVIL, "reason": f"{EVIL}\nx: y"}


@pytest.mark.parametrize(
    "argv",
    soak_except(
        [
            ("jobs",),
            ("jobs", "--all-tenants"),
            ("dead", "--json"),
            ("job", "a"),
            ("job", "a", "--watch", "--timeout", "0"),
            ("models",),
            ("models", "iris"),
            ("retry", "--dead"),
            ("audit",),
            ("predict", "-m", "iris", "1", "2", "3", "4"),
            ("doctor", "--model-dir", "."),
        ],
        2,
    ),
    ids=" ".join,
)
def test_a_hostile_server_commands_nothing(hostile: HostileServer, argv: tuple[str, ...]) -> None:
    error = {"code": EVIL, "message": EVIL}
    job: dict[str, Any] = {"job_id": EVIL, "status": EVIL, "model": EVIL, "error": error}
    job |= {"tenant": EVIL, "result": {EVIL: EVIL}, EVIL: EVIL}
    model = hostile.answers["GET /models/iris"] | {
        "description": EVIL,
        "batching": EVIL,
        "labels": [EVIL],
        "problems": [EVIL_PROBLEM],
        "example": {"data": [[EVIL]]},
        "inputs": [{"name": EVIL, "datatype": EVIL, "shape": [EVIL]}],
        "run_times": {EVIL: {"1": 1.0}},
    }
    hostile.answers |= {
        "GET /jobs": {"jobs": [job], "cursor": None},
        "GET /job": job,
        "GET /models": {"models": [{**model, "model": EVIL}], "problems": [EVIL_PROBLEM]},
        "GET /models/iris": model,
        "POST /predict": {**job, "status": "failed"},
        "POST /jobs/retry": {
            "retried": [],
            "refused": [{"job_id": EVIL, "code": EVIL, "detail": f"{EVIL}\nasyncinfer: x"}],
            "more": False,
        },
        "GET /audit": {
            "entries": [
                {
                    **{"at": "2026-01-01T00:00:00Z", "jobs": 1, "filter": {EVIL: f"{EVIL}\nx: y"}},
                    **dict.fromkeys(("action", "tenant", "key", "outcome"), EVIL),
                }
            ],
            "unreadable": 0,
            "cursor": None,
        },
        "GET /health": {"status": "ok", "redis": EVIL},
    }
    text = shown_on_a_terminal(*argv)
    assert "evil" in text
    assert "\nx: y" not in text.replace("\r", "")
    assert "\nasyncinfer: x" not in text.replace("\r", "")


def test_an_error_of_a_server_is_one_line_and_commands_nothing(hostile: HostileServer) -> None:
    hostile.status = 422
    hostile.answers = {"GET /jobs": {"code": "x", "detail": f"{EVIL}\nasyncinfer: forged"}}
    text = shown_on_a_terminal("jobs")
    assert SHOWN in text
    assert len(text.splitlines()) == 1
