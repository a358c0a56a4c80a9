"""The start banner shows where the service is and a line to paste."""

import json
import shlex
from typing import Any

import pytest

from asyncinfer.cli.addresses import shown_url
from asyncinfer.cli.serve.banner import Banner


def banner(**changes: Any) -> Banner:
    usual: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 8000,
        "redis": "Valkey 9",
        "models": ("digits", "iris"),
        "default_model": "iris",
        "example": [[5.1, 3.5]],
        "needs_key": False,
    }
    return Banner(**(usual | changes))


def curl(shown: Banner) -> list[str]:
    line = next(line for line in shown.text().splitlines() if " Try " in line)
    return shlex.split(line.removeprefix("  Try "))


def test_the_curl_line_posts_the_default_models_example() -> None:
    words = curl(banner())

    assert words[0] == "curl"
    assert "content-type: application/json" in words
    assert json.loads(words[words.index("-d") + 1]) == {"data": [[5.1, 3.5]]}
    assert words[-1] == "http://127.0.0.1:8000/predict"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "those of workers elsewhere; start one: asyncinfer work"),
        ({"model_dir": "/srv/models"}, "none yet; put an ONNX file into /srv/models"),
        (
            {"model_dir": "/srv/models", "refused": ("churn",)},
            "none; not churn: http://127.0.0.1:8000/models says why",
        ),
    ],
)
def test_without_a_model_it_says_where_one_would_come_from(
    changes: dict[str, Any], message: str
) -> None:
    shown = banner(models=(), default_model=None, example=None, **changes)

    assert f"  Models   {message}\n" in shown.text()


def test_an_example_with_quotes_can_be_pasted() -> None:
    words = curl(banner(example=["it's"]))

    assert json.loads(words[words.index("-d") + 1]) == {"data": ["it's"]}


def test_without_an_example_the_curl_line_shows_the_models() -> None:
    assert curl(banner(example=None)) == ["curl", "http://127.0.0.1:8000/models"]


def test_where_keys_are_needed_the_curl_line_sends_one() -> None:
    assert "x-api-key: $API_KEY" in curl(banner(needs_key=True))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("example.com", "http://example.com:8000"),
    ],
)
def test_the_url_is_one_that_can_be_opened_here(host: str, url: str) -> None:
    assert f"URL      {url}\n" in banner(host=host).text()


def test_broken_models_are_not_shown_as_served() -> None:
    text = banner(refused=["bad", "worse"]).text()

    assert "digits, iris (default); not bad, worse: http://127.0.0.1:8000/models says why" in text


def test_the_default_model_is_marked() -> None:
    assert "Models   digits, iris (default)\n" in banner().text()


def test_without_a_worker_here_it_says_how_to_start_one() -> None:
    assert "asyncinfer work" in banner(models=()).text()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:hunter2@host:6379/1?password=x", "redis://host:6379/1"),
        ("sentinel://:p@a:26379,b:26379/main", "sentinel://a:26379,b:26379/main"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("sentinel://u:p@a,b,[::1]:3/main?ssl=true", "sentinel://a,b,[::1]:3/main"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown
