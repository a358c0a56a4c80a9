"""All settings, each declared once: flag, environment variable, default, unit, help and check."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import msgspec.inspect as types
from msgspec import Meta, Struct

from asyncinfer import redis_url
from asyncinfer.errors import InvalidSetting
from asyncinfer.jobs import NAME_PATTERN

_DAY_SECONDS: Final = 24 * 3600
_YEAR_SECONDS: Final = 365 * _DAY_SECONDS

_ModelName = Annotated[str, Meta(pattern=rf"^(?!stats\Z){NAME_PATTERN}\Z")]
_MODEL_NAME: Final = "up to 64 letters, digits, `_`, `.` and `-`, not `stats`"
_Port = Annotated[int, Meta(ge=1, le=65535)]


def _about(
    description: str,
    *,
    unit: str = "",
    unset: str = "none",
    allowed: str = "",
    secret: bool = False,
    **bounds: Any,
) -> Meta:
    """What `--help` says of a setting: `unset` is the meaning of no value, `allowed` the meaning of
    the pattern in words. The value of a secret is never shown."""
    words = {"unit": unit, "unset": unset, "allowed": allowed, "secret": secret}
    return Meta(description=description, extra=words, **bounds)


class Settings(Struct, frozen=True, kw_only=True):
    # --- where jobs are
    redis_url: Annotated[
        str | None,
        _about(
            "URL of the Redis or Valkey server; wins over REDIS_HOST. With neither, Valkey is "
            "embedded.",
            allowed="redis://, rediss://, unix:// or sentinel://host:26379,host2:26379/service",
            secret=True,
        ),
    ] = None
    redis_host: Annotated[
        Annotated[str, Meta(pattern=r"^([^\s/@:?#]+|[0-9A-Fa-f:.]+)\Z")] | None,
        _about("Host of the Redis or Valkey server.", allowed="a host name or an IP address"),
    ] = None
    redis_port: Annotated[int, _about("Port of the server at REDIS_HOST.", ge=1, le=65535)] = 6379
    queue_name: Annotated[
        str,
        _about(
            "Name of the default model's list in Redis, and prefix of all other lists.",
            pattern=r"^[^{}\x00-\x1f\x7f]{1,64}\Z",
            allowed="1 to 64 characters, without braces and control characters",
        ),
    ] = "predict_queue"
    data_dir: Annotated[
        Path | None,
        _about(
            "Folder where the embedded Valkey keeps all jobs.",
            unset="`asyncinfer` in the user's state folder",
        ),
    ] = None
    embedded_maxmemory: Annotated[
        Annotated[int, Meta(ge=16 << 20, le=1 << 50)] | None,
        _about(
            "Memory of the embedded Valkey (its maxmemory), above which submits are refused.",
            unit="bytes",
            unset="a quarter of the memory of the machine or control group; at a start 1.25 times "
            "what is stored, if that is more",
            allowed="a whole number from 16777216 to 1125899906842624",
        ),
    ] = None

    # --- what is served
    model_dir: Annotated[
        Path | None,
        _about(
            "Folder of the models to serve.",
            unset="./model if it exists; else for `work` the folder of a `serve` on this machine; "
            "else the shipped models",
        ),
    ] = None
    model: Annotated[
        Path | None,
        _about(
            "Serve only this .onnx file, as the default model: path/to/name.onnx.",
            unset="what MODEL_DIR has",
        ),
    ] = None
    models: Annotated[
        tuple[_ModelName, ...],
        _about(
            "Names of the models to serve: a,b.",
            unset="all in MODEL_DIR",
            allowed=f"names separated by commas, each {_MODEL_NAME}",
        ),
    ] = ()
    default_model: Annotated[
        _ModelName | None,
        _about(
            "The model of requests that name none.",
            unset="as first started, else iris, else the only one",
            allowed=_MODEL_NAME,
        ),
    ] = None

    # --- the API
    host: Annotated[str, _about("Address that the API listens on.", min_length=1)] = "127.0.0.1"
    port: Annotated[int, _about("Port that the API listens on.", ge=1, le=65535)] = 8000
    api_processes: Annotated[
        int,
        _about(
            "Processes of the API, for machines with a core for each.",
            unit="processes",
            ge=1,
            le=64,
        ),
    ] = 1
    api_keys: Annotated[
        Path | None, _about("File of API keys; `asyncinfer keygen` makes its lines.")
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        _about("Accepted Host headers besides localhost and HOST: a,b; * accepts any."),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        _about("Origins of web pages that may submit and change jobs: https://app.example.com."),
    ] = ()
    max_body: Annotated[int, _about("Largest request body.", unit="bytes", ge=1024, le=1 << 30)] = (
        16 << 20
    )
    max_json: Annotated[
        int, _about("Largest request body in JSON.", unit="bytes", ge=1024, le=1 << 30)
    ] = 2 << 20
    max_inflight_bytes: Annotated[
        int,
        _about(
            "Largest total size of the large bodies that an API process holds at a time, in each "
            "direction.",
            unit="bytes",
            ge=1024,
            le=1 << 40,
        ),
    ] = 128 << 20
    express: Annotated[
        bool,
        _about(
            "Answer usual submits without a task for each, which takes less CPU time; turn it off "
            "only to find a fault."
        ),
    ] = True

    webhooks: Annotated[
        bool,
        _about("Send webhooks from the processes of this API; others send them if it is off."),
    ] = True
    webhook_secrets: Annotated[
        Path | None,
        _about("File of the secrets that sign webhooks, of mode 0600: tenant host whsec_..."),
    ] = None
    webhook_allow: Annotated[
        tuple[str, ...],
        _about(
            "Receivers of webhooks that may have http and an address that is not public: "
            "host:port,host2:port.",
        ),
    ] = ()
    webhook_proxy: Annotated[
        Annotated[str, Meta(pattern=r"^https?://([^\s/@?#]*@)?[^\s/@?#]+/?\Z")] | None,
        _about(
            "HTTP proxy that webhooks are sent through; it decides which addresses are reached.",
            allowed="http://host:port or http://user:password@host:port",
            secret=True,
        ),
    ] = None
    public_url: Annotated[
        Annotated[str, Meta(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?\Z")] | None,
        _about(
            "Where clients reach this API; webhooks have it in front of the path of a result.",
            allowed="https://host or https://host/path",
        ),
    ] = None

    metrics_port: Annotated[
        _Port | None,
        _about(
            "Port of the API for /metrics.",
            unset="off",
            allowed="a whole number from 1 to 65535",
        ),
    ] = None
    metrics_host: Annotated[str, _about("Address that METRICS_PORT listens on.", min_length=1)] = (
        "127.0.0.1"
    )

    # --- a worker
    concurrency: Annotated[
        int,
        _about(
            "Batches that a worker runs in parallel; 0: one per core.",
            unit="threads",
            ge=0,
            le=1024,
        ),
    ] = 0
    max_batch: Annotated[
        int, _about("Largest number of jobs in a batch.", unit="jobs", ge=1, le=1000)
    ] = 128
    max_models: Annotated[
        int,
        _about(
            "Largest number of model versions in memory; the least recently used is unloaded.",
            unit="versions",
            ge=1,
            le=100_000,
        ),
    ] = 32
    max_model_bytes: Annotated[
        int,
        _about(
            "Largest total size of the files of models in memory; 0: no limit.",
            unit="bytes",
            ge=0,
            le=1 << 50,
        ),
    ] = 0
    rescan_seconds: Annotated[
        float,
        _about(
            "Interval of scans of MODEL_DIR, in addition to change events of the file system.",
            unit="seconds",
            ge=0.1,
            le=_DAY_SECONDS,
        ),
    ] = 10.0
    prediction_timeout: Annotated[
        float, _about("Longest time that a run may take.", unit="seconds", gt=0, le=_DAY_SECONDS)
    ] = 10.0
    brpop_timeout: Annotated[
        float,
        _about(
            "Longest wait of one blocking pop (BRPOP) for a job.", unit="seconds", ge=0.01, le=60
        ),
    ] = 1.0
    drain_timeout: Annotated[
        float,
        _about(
            "Longest time that a stopping worker waits for its running jobs.",
            unit="seconds",
            ge=0,
            le=_DAY_SECONDS,
        ),
    ] = 20.0

    allow_custom_ops: Annotated[
        bool, _about("Load native libraries with custom operators that a model.toml names.")
    ] = False
    monitor_port: Annotated[
        _Port | None,
        _about(
            "Port of a worker for /health/live, /health/ready and /metrics.",
            unset="off",
            allowed="a whole number from 1 to 65535",
        ),
    ] = None
    monitor_host: Annotated[str, _about("Address that MONITOR_PORT listens on.", min_length=1)] = (
        "127.0.0.1"
    )

    # --- the log
    log_level: Annotated[
        str,
        _about(
            "Least level of the lines that are logged; debug adds what was no valid request.",
            pattern=r"^(?i:debug|info|warning|error)\Z",
            allowed="debug, info, warning or error",
        ),
    ] = "info"
    log_format: Annotated[
        str,
        _about(
            "Form of the log on stderr: lines of text, or a JSON object a line.",
            pattern=r"^(text|json)\Z",
            allowed="text or json",
        ),
    ] = "text"
    access_log: Annotated[bool, _about("Log a line for each request that the API answers.")] = False

    # --- a queue
    max_queue: Annotated[
        int, _about("Largest number of waiting jobs in a queue.", unit="jobs", ge=1, le=100_000_000)
    ] = 100_000
    max_queue_bytes: Annotated[
        int,
        _about(
            "Largest total size of waiting inputs in a queue.", unit="bytes", ge=1024, le=1 << 40
        ),
    ] = 1 << 30
    max_kept_bytes: Annotated[
        int,
        _about(
            "Largest total size of inputs, results and errors that a queue's ended jobs keep.",
            unit="bytes",
            ge=1024,
            le=1 << 40,
        ),
    ] = 4 << 30
    max_webhooks: Annotated[
        int,
        _about(
            "Largest number of unfinished jobs with a webhook, and of deliveries to come, in a "
            "queue.",
            unit="webhooks",
            ge=1,
            le=10_000_000,
        ),
    ] = 100_000
    max_webhook_bytes: Annotated[
        int,
        _about(
            "Largest total size of what a queue keeps for its webhooks.",
            unit="bytes",
            ge=1024,
            le=1 << 40,
        ),
    ] = 256 << 20
    job_ttl: Annotated[
        int,
        _about(
            "Time that a completed or cancelled job is kept.",
            unit="seconds",
            ge=1,
            le=_YEAR_SECONDS,
        ),
    ] = 3600
    failed_ttl: Annotated[
        int, _about("Time that a failed job is kept.", unit="seconds", ge=1, le=_YEAR_SECONDS)
    ] = _DAY_SECONDS
    max_ttl: Annotated[
        int,
        _about(
            "Longest `ttl_seconds` of a job; JOB_TTL and FAILED_TTL may not be longer.",
            unit="seconds",
            ge=1,
            le=_YEAR_SECONDS,
        ),
    ] = 7 * _DAY_SECONDS
    keep_input: Annotated[bool, _about("Keep the input of completed jobs too.")] = False
    lease_seconds: Annotated[
        float,
        _about(
            "Lease duration: jobs of a worker that stops renewing are redelivered after this.",
            unit="seconds",
            ge=0.1,
            le=3600,
        ),
    ] = 15.0
    reap_seconds: Annotated[
        float,
        _about(
            "Interval of the recovery sweep for lost jobs; at most a sixth of LEASE_SECONDS.",
            unit="seconds",
            ge=0.01,
            le=600,
        ),
    ] = 2.0
    max_deliveries: Annotated[
        int,
        _about(
            "Delivery attempts before a job becomes a dead letter.", unit="attempts", ge=1, le=100
        ),
    ] = 3

    # --- traces
    traces: Annotated[
        Literal["off", "on"],
        _about(
            "Export spans of jobs with OpenTelemetry, which `pip install 'asyncinfer[otel]'` adds.",
            allowed="off or on",
        ),
    ] = "off"


_COMMON: Final = frozenset(
    {
        *("redis_url", "data_dir", "model_dir", "model", "models", "default_model"),
        *("host", "port", "api_keys", "api_processes"),
        *("concurrency", "max_batch", "prediction_timeout"),
        *("max_queue", "job_ttl"),
    }
)
"""The settings that most deployments consider; `--help` lists the others as advanced."""


class Knob(Struct, frozen=True):
    """A setting as the command line and its messages show it."""

    name: str
    type: Any
    default: Any
    help: str
    unit: str
    allowed: str
    unset: str
    secret: bool
    advanced: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return self.name.upper()


@cache
def knobs() -> tuple[Knob, ...]:
    """All settings, in the order of their declaration."""
    declared = {field.name: field for field in msgspec.structs.fields(Settings)}
    described = types.type_info(Settings)
    assert isinstance(described, types.StructType)
    return tuple(_knob(field, declared[field.name].type) for field in described.fields)


def _knob(field: types.Field, declared: Any) -> Knob:
    assert isinstance(field.type, types.Metadata)
    words = field.type.extra or {}
    return Knob(
        name=field.name,
        type=declared,
        default=field.default,
        help=(field.type.extra_json_schema or {})["description"],
        unit=words["unit"],
        allowed=words["allowed"] or _allowed(field.type.type),
        unset=words["unset"],
        secret=words["secret"],
        advanced=field.name not in _COMMON,
    )


def _allowed(kind: types.Type) -> str:
    """The values that a type allows, in words."""
    match kind:
        case types.BoolType():
            return "true or false"
        case types.IntType():
            return f"a whole number from {kind.ge} to {kind.le}"
        case types.FloatType(gt=None):
            return f"a number from {kind.ge} to {kind.le}"
        case types.FloatType():
            return f"a number above {kind.gt}, at most {kind.le}"
        case types.UnionType(types=(types.CustomType(), _)):
            return "a path"
        case _:
            return "text"


# --- reading ---------------------------------------------------------------------------------


def read(environ: Mapping[str, str], flags: Mapping[str, str]) -> Settings:
    """The settings from flags, by field name, and from the environment; flags win.

    An empty variable counts as unset. Raises InvalidSetting for a value that is not allowed, for a
    JOB_TTL or FAILED_TTL above MAX_TTL, and as `redis_url.parse` does.
    """
    values = {}
    for knob in knobs():
        if knob.name in flags:
            values[knob.name] = _parse(knob, knob.flag, flags[knob.name])
        elif value := environ.get(knob.variable):
            values[knob.name] = _parse(knob, knob.variable, value)
    found = Settings(**values)
    _check_ttls(found)
    if found.redis_url:
        redis_url.parse(found.redis_url)
    return found


def as_environment(settings: Settings) -> dict[str, str]:
    """The environment variables from which `read` restores these settings."""
    texts = {knob.variable: text(getattr(settings, knob.name)) for knob in knobs()}
    return {variable: value for variable, value in texts.items() if value}


def text(value: Any) -> str:
    """A value as text in an environment variable; empty for None."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return repr(value).removesuffix(".0")
        case tuple():
            return ",".join(value)
        case _:
            return str(value)


def _check_ttls(found: Settings) -> None:
    """Raises InvalidSetting if jobs that ask for nothing would be kept longer than MAX_TTL."""
    for name, seconds in (("JOB_TTL", found.job_ttl), ("FAILED_TTL", found.failed_ttl)):
        if seconds > found.max_ttl:
            raise InvalidSetting(
                f"{name} is {seconds} s, but MAX_TTL lets no job be kept longer than "
                f"{found.max_ttl} s. Lower {name}, or raise MAX_TTL."
            )


def _parse(knob: Knob, source: str, value: str) -> Any:
    """The value of a setting; `source` names its flag or variable in an error."""
    raw = value.split(",") if isinstance(knob.default, tuple) else value
    try:
        return msgspec.convert(raw, knob.type, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        shown = "not valid" if knob.secret else repr(value[:100])
        unit = f" ({knob.unit})" if knob.unit else ""
        raise InvalidSetting(f"{source} is {shown}; it must be {knob.allowed}{unit}.") from error


def _path(kind: type, value: str) -> Path:
    assert kind is Path
    return Path(value).expanduser()
