"""Every knob, declared once: its flag, environment variable, default, unit, help and check."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import msgspec.inspect as types
from msgspec import Meta, Struct

from asyncinfer.errors import InvalidSetting

_DAY_SECONDS: Final = 24 * 3600
_YEAR_SECONDS: Final = 365 * _DAY_SECONDS

_ModelName = Annotated[str, Meta(pattern=r"^(?!stats\Z)[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")]
_MODEL_NAME: Final = "up to 64 letters, digits, `_`, `.` and `-`, not `stats`"
_Port = Annotated[int, Meta(ge=1, le=65535)]
_RedisUrl = Annotated[str, Meta(pattern=r"^(rediss?|unix|sentinel)://")]


def _about(
    description: str,
    *,
    unit: str = "",
    unset: str = "none",
    allowed: str = "",
    secret: bool = False,
    **bounds: Any,
) -> Meta:
    """`unset` says what no value means, `allowed` what a pattern means; a secret is not shown."""
    words = {"unit": unit, "unset": unset, "allowed": allowed, "secret": secret}
    return Meta(description=description, extra=words, **bounds)


class Settings(Struct, frozen=True, kw_only=True):
    # --- where jobs are
    redis_url: Annotated[
        _RedisUrl | None,
        _about(
            "Your Redis or Valkey. Wins over REDIS_HOST; with neither, Valkey is embedded.",
            allowed="redis://, rediss://, unix:// or sentinel://host:26379,host2:26379/service",
            secret=True,
        ),
    ] = None
    redis_host: Annotated[str | None, _about("Your Redis's host.")] = None
    redis_port: Annotated[int, _about("Its port, beside REDIS_HOST.", ge=1, le=65535)] = 6379
    queue_name: Annotated[
        str,
        _about(
            "The default model's list in Redis, and the prefix of all others.",
            pattern=r"^[^{}\x00-\x1f\x7f]{1,64}\Z",
            allowed="1 to 64 characters, without braces and control characters",
        ),
    ] = "predict_queue"
    data_dir: Annotated[
        Path | None,
        _about(
            "Where the embedded Valkey keeps all jobs.",
            unset="`asyncinfer` in the user's state folder",
        ),
    ] = None

    # --- what is served
    model_dir: Annotated[
        Path | None,
        _about(
            "The models to serve.",
            unset="./model where it exists; else for `work` those of a `serve` beside it; else the "
            "shipped models",
        ),
    ] = None
    model: Annotated[
        Path | None,
        _about(
            "One file to serve instead, as the default model: path/to/name.onnx.",
            unset="what MODEL_DIR has",
        ),
    ] = None
    models: Annotated[
        tuple[_ModelName, ...],
        _about(
            "Names to serve: a,b.",
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
    host: Annotated[str, _about("The address that the API listens on.", min_length=1)] = "127.0.0.1"
    port: Annotated[int, _about("Its port.", ge=1, le=65535)] = 8000
    api_processes: Annotated[
        int,
        _about(
            "Processes that answer on it, each with a core to use.",
            unit="processes",
            ge=1,
            le=64,
        ),
    ] = 1
    api_keys: Annotated[
        Path | None, _about("The file of API keys; `asyncinfer keygen` makes its lines.")
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        _about("Host headers to answer to, beside localhost and HOST: a,b; * for any."),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        _about("Origins of other sites' pages that may change state: https://app.example.com."),
    ] = ()
    max_body: Annotated[int, _about("The largest request.", unit="bytes", ge=1024, le=1 << 30)] = (
        16 << 20
    )
    max_json: Annotated[
        int, _about("The largest request in JSON.", unit="bytes", ge=1024, le=1 << 30)
    ] = 2 << 20

    # --- a worker
    concurrency: Annotated[
        int,
        _about(
            "Batches that one worker runs side by side; 0: as many as cores.",
            unit="threads",
            ge=0,
            le=1024,
        ),
    ] = 0
    max_batch: Annotated[int, _about("Jobs that share one run.", unit="jobs", ge=1, le=1000)] = 128
    max_models: Annotated[
        int,
        _about(
            "Versions of models that stay loaded; the least used make room.",
            unit="versions",
            ge=1,
            le=100_000,
        ),
    ] = 32
    max_model_bytes: Annotated[
        int,
        _about(
            "Their files' size together; 0: no limit.",
            unit="bytes",
            ge=0,
            le=1 << 50,
        ),
    ] = 0
    rescan_seconds: Annotated[
        float,
        _about(
            "How often MODEL_DIR is read again, beside when the system tells of a change.",
            unit="seconds",
            ge=0.1,
            le=_DAY_SECONDS,
        ),
    ] = 10.0
    prediction_timeout: Annotated[
        float, _about("How long one run may take.", unit="seconds", gt=0, le=_DAY_SECONDS)
    ] = 10.0
    brpop_timeout: Annotated[
        float, _about("How long one blocking pop waits.", unit="seconds", ge=0.01, le=60)
    ] = 1.0
    drain_timeout: Annotated[
        float,
        _about("How long a stop waits for running jobs.", unit="seconds", ge=0, le=_DAY_SECONDS),
    ] = 20.0

    allow_custom_ops: Annotated[
        bool, _about("Load the native libraries of operators that a model.toml names.")
    ] = False
    monitor_port: Annotated[
        _Port | None,
        _about(
            "A worker's private port: /health/live, /health/ready and /metrics.",
            unset="off",
            allowed="a whole number from 1 to 65535",
        ),
    ] = None
    monitor_host: Annotated[str, _about("The address of that port.", min_length=1)] = "127.0.0.1"

    # --- a queue
    max_queue: Annotated[
        int, _about("Jobs that may wait in one queue.", unit="jobs", ge=1, le=100_000_000)
    ] = 100_000
    max_queue_bytes: Annotated[
        int, _about("Inputs that may wait in one queue.", unit="bytes", ge=1024, le=1 << 40)
    ] = 1 << 30
    job_ttl: Annotated[
        int,
        _about(
            "How long a completed or cancelled job is kept.", unit="seconds", ge=1, le=_YEAR_SECONDS
        ),
    ] = 3600
    failed_ttl: Annotated[
        int,
        _about("How long a failed job is kept.", unit="seconds", ge=1, le=_YEAR_SECONDS),
    ] = _DAY_SECONDS
    keep_input: Annotated[bool, _about("Keep the input of a completed job too.")] = False
    lease_seconds: Annotated[
        float,
        _about("How long a silent worker keeps its jobs.", unit="seconds", ge=0.1, le=3600),
    ] = 15.0
    reap_seconds: Annotated[
        float,
        _about(
            "How often lost jobs are looked for; a sixth of the lease at most.",
            unit="seconds",
            ge=0.01,
            le=600,
        ),
    ] = 2.0
    max_deliveries: Annotated[
        int,
        _about("Workers that may die with a job before it fails.", unit="workers", ge=1, le=100),
    ] = 3


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
    """One setting as people meet it."""

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
    """What a value must be, in words."""
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
    """Flags (by field name) win over the environment; raises InvalidSetting."""
    values = {}
    for knob in knobs():
        if knob.name in flags:
            values[knob.name] = _parse(knob, knob.flag, flags[knob.name])
        elif given := environ.get(knob.variable):
            values[knob.name] = _parse(knob, knob.variable, given)
    return Settings(**values)


def as_environment(settings: Settings) -> dict[str, str]:
    """The variables from which `read` makes these very settings."""
    texts = {knob.variable: text(getattr(settings, knob.name)) for knob in knobs()}
    return {variable: value for variable, value in texts.items() if value}


def text(value: Any) -> str:
    """A value as it is written in a variable; empty for none."""
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


def _parse(knob: Knob, source: str, given: str) -> Any:
    raw = given.split(",") if isinstance(knob.default, tuple) else given
    try:
        return msgspec.convert(raw, knob.type, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        found = "not valid" if knob.secret else repr(given[:100])
        unit = f" ({knob.unit})" if knob.unit else ""
        raise InvalidSetting(f"{source} is {found}; it must be {knob.allowed}{unit}.") from error


def _path(kind: type, given: str) -> Path:
    assert kind is Path
    return Path(given).expanduser()
