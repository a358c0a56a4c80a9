"""Every setting can be set, is checked, and reaches child processes unchanged."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer import settings
from asyncinfer.errors import InvalidSetting
from asyncinfer.settings import Settings

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(
    lambda name: name != "stats"
)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


ANY_SETTINGS = st.builds(
    Settings,
    redis_url=st.none() | st.sampled_from(["redis://h/1", "unix:///a b/s", "rediss://u:p@h"]),
    redis_port=st.integers(1, 65535),
    data_dir=st.none() | st.sampled_from([Path("/a b/c"), Path("here")]),
    models=st.lists(NAMES, max_size=3).map(tuple),
    default_model=st.none() | NAMES,
    allowed_hosts=st.lists(st.sampled_from(["a.example", "*"]), max_size=3).map(tuple),
    keep_input=st.booleans(),
    prediction_timeout=numbers(0.001, 86400),
    lease_seconds=numbers(0.1, 3600),
    max_queue_bytes=st.integers(1024, 1 << 40),
    embedded_maxmemory=st.none() | st.integers(16 << 20, 1 << 50),
    max_ttl=st.integers(24 * 3600, 365 * 24 * 3600),
)


@given(ANY_SETTINGS)
def test_a_child_process_reads_the_settings_of_its_parent(parent: Settings) -> None:
    assert settings.read(settings.as_environment(parent), {}) == parent


def test_empty_variables_give_the_defaults() -> None:
    assert settings.read({"HOME": "/root", "REDIS_URL": "", "MODELS": ""}, {}) == Settings()


def test_a_flag_wins_over_the_environment() -> None:
    found = settings.read({"PORT": "8001", "HOST": "localhost"}, {"port": "8002"})

    assert (found.port, found.host) == (8002, "localhost")


def test_a_tilde_is_the_home_folder() -> None:
    assert settings.read({"DATA_DIR": "~/jobs"}, {}).data_dir == Path.home() / "jobs"


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PORT", "0", "a whole number from 1 to 65535"),
        ("PORT", "http", "a whole number from 1 to 65535"),
        ("MAX_BATCH", "1.5", "a whole number from 1 to 1000"),
        ("PREDICTION_TIMEOUT", "0", "a number above 0, at most 86400 (seconds)"),
        ("LEASE_SECONDS", "nan", "a number from 0.1 to 3600 (seconds)"),
        ("LEASE_SECONDS", "inf", "a number from 0.1 to 3600 (seconds)"),
        ("KEEP_INPUT", "perhaps", "true or false"),
        ("QUEUE_NAME", "a{b}", "1 to 64 characters, without braces and control characters"),
        ("QUEUE_NAME", "a\n", "1 to 64 characters, without braces and control characters"),
        ("QUEUE_NAME", "a" * 65, "1 to 64 characters, without braces and control characters"),
        ("DEFAULT_MODEL", "stats", "up to 64 letters, digits, `_`, `.` and `-`, not `stats`"),
        ("MODELS", "iris,,", "names separated by commas"),
    ],
)
def test_a_wrong_value_is_an_error_with_its_name_the_value_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    with pytest.raises(InvalidSetting) as raised:
        settings.read({variable: value}, {})

    assert raised.value.detail.startswith(f"{variable} is {value!r}; it must be {allowed}")


def test_a_wrong_flag_is_named_by_its_flag() -> None:
    with pytest.raises(InvalidSetting, match=r"^--max-batch is '0'"):
        settings.read({}, {"max_batch": "0"})


def test_a_wrong_redis_url_does_not_show_its_password() -> None:
    with pytest.raises(InvalidSetting, match=r"REDIS_URL .* redis://") as raised:
        settings.read({"REDIS_URL": "http://user:hunter2@host"}, {})

    assert "hunter2" not in raised.value.detail


@pytest.mark.parametrize("variable", ["JOB_TTL", "FAILED_TTL"])
def test_no_job_may_be_kept_longer_than_max_ttl(variable: str) -> None:
    times = {"JOB_TTL": "60", "FAILED_TTL": "60", "MAX_TTL": "60"}
    assert settings.read(times, {}).max_ttl == 60

    with pytest.raises(InvalidSetting) as raised:
        settings.read({**times, variable: "61"}, {})

    assert raised.value.detail == (
        f"{variable} is 61 s, but MAX_TTL lets no job be kept longer than 60 s. Lower {variable}, "
        "or raise MAX_TTL."
    )


def test_every_default_is_an_allowed_value() -> None:
    for knob in settings.knobs():
        assert _is_allowed(knob.type, knob.default), knob.name


def _is_allowed(kind: Any, value: Any) -> bool:
    return bool(msgspec.convert(value, kind, dec_hook=lambda _, path: path) == value)


def test_every_setting_has_a_help_text_and_says_what_is_allowed() -> None:
    assert all(knob.help.endswith(".") and knob.allowed for knob in settings.knobs())
