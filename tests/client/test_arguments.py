"""Wrong arguments: every one of a wrong type is named before anything is sent."""

import inspect
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

from asyncinfer.client import (
    AsyncClient,
    AsyncGroup,
    AsyncinferError,
    AsyncJob,
    CannotSend,
    Client,
    Group,
    InvalidInput,
    InvalidSecret,
    Job,
    ProgressBar,
    WebhookNotVerified,
    verify_webhook,
)
from asyncinfer.client._flows.submitting import JobOptions, MapJobOptions
from tests.ports import free_port

SETOSA: Final = [[5.1, 3.5, 1.4, 0.2]]
UNCHECKED: Final = {"data", "rows", "frame", "body", "query", "look"}
"""Inputs, and what is passed on as it is."""


def parameters(method: Callable[..., Any]) -> set[str]:
    """The names of what a method takes by keyword, options too."""
    names = set(inspect.signature(method).parameters) - UNCHECKED - {"self"}
    if "options" not in names:
        return names
    options = MapJobOptions if "map" in method.__name__ else JobOptions
    return names - {"options"} | set(options.__annotations__)


def objects() -> list[Any]:
    """A client, a job and a group of each kind, whose server is away."""
    url = f"http://127.0.0.1:{free_port()}"
    client, aclient = Client(url), AsyncClient(url)
    client.close()
    aclient._driver.closed = True
    view = {"job_id": "1", "status": "pending"}
    return [
        client,
        aclient,
        Job(client._server, client._driver, view),
        AsyncJob(aclient._server, aclient._driver, view),
        Group(client._server, client._driver, {"group": "g", "jobs": 1}),
        AsyncGroup(aclient._server, aclient._driver, {"group": "g", "jobs": 1}),
    ]


async def call(method: Callable[..., Any], parameter: str) -> None:
    result = method(**{parameter: object()})
    if inspect.isawaitable(result):
        await result


async def test_every_argument_of_a_wrong_type_is_named() -> None:
    tried = 0
    for owner in objects():
        for name, method in inspect.getmembers(owner, inspect.ismethod):
            for parameter in parameters(method) if not name.startswith("_") else ():
                with pytest.raises(CannotSend, match=f"^{parameter}=<object.*{parameter} takes "):
                    await call(method, parameter)
                tried += 1
    assert tried > 150


@pytest.mark.parametrize("kind", [Client, AsyncClient, ProgressBar])
def test_every_argument_of_a_constructor_of_a_wrong_type_is_named(kind: type) -> None:
    for parameter in parameters(vars(kind)["__init__"]):
        with pytest.raises(CannotSend, match=f"^{parameter}.* is of the type object"):
            kind(**{parameter: object()})


def test_a_key_of_a_wrong_type_is_not_shown() -> None:
    with pytest.raises(CannotSend, match="api_key is of the type bytes") as refused:
        Client(api_key=b"hidden")  # type: ignore[arg-type]
    assert "hidden" not in str(refused.value)


CALLS: Final[dict[str, Callable[[Client], Any]]] = {
    "webhook=5 is of the type int; webhook takes a string, a dict or None": (
        lambda client: client.submit(SETOSA, webhook=5)  # type: ignore[arg-type]
    ),
    "timeout='a' is of the type str; timeout takes a number or None": (
        lambda client: client.predict(SETOSA, timeout="a")  # type: ignore[arg-type]
    ),
    "job_id=5 is of the type int; job_id takes a string": (
        lambda client: client.job(5)  # type: ignore[arg-type]
    ),
    "timeout=nan": lambda client: client.submit(SETOSA).wait(float("nan")),
    "job_ids='an-id' is of the type str; job_ids takes a list of strings or None": (
        lambda client: client.cancel_all("an-id")
    ),
    "'x' of the rows is a single value": lambda client: client.map({"x": 5}),
    "The input is of the type generator. Give lists": lambda client: client.predict(
        row for row in [SETOSA]
    ),
    "The input has values of the type object; give numbers": (
        lambda client: client.predict(np.array([[object()] * 4]))
    ),
    "-3.40282e+38 to 3.40282e+38, and the float64 array has 1e+300. Replace": (
        lambda client: client.predict(np.array([[5.1, 3.5, 1.4, 1e300]]))
    ),
    "x takes FP16, numbers from -65504 to 65504, and the int64 array has -70000. Replace": (
        lambda client: client.predict(np.array([[1, -70000, 3, 4]]), "half")
    ),
    "is no request": lambda client: client.request("GET", "health"),
    "cannot be sent as JSON": lambda client: client.request("GET", "/health", body=object()),
    "half a character": lambda client: client.job("\ud800"),
    "has half a character": lambda client: client.jobs(group="\ud800"),
    "cannot be used": lambda client: Client(client.url, ca="\0"),
}


@pytest.mark.parametrize("message", CALLS)
def test_an_argument_that_cannot_be_right_is_an_error_of_the_client(
    client: Client, message: str
) -> None:
    with pytest.raises(AsyncinferError) as refused:
        CALLS[message](client)
    assert message in str(refused.value)
    assert isinstance(refused.value, ValueError | InvalidInput)


NUMBERS: Final[list[tuple[Any, int]]] = [(np.float32, 60), (np.int64, 1)]


def test_numbers_of_numpy_and_lists_of_any_kind_are_taken(client: Client) -> None:
    minute, one = (kind(number) for kind, number in NUMBERS)
    job = client.submit(SETOSA, finish_within_seconds=minute, ttl_seconds=60)
    assert job.wait(minute).status == "completed"
    assert client.jobs(limit=one, dead=False)
    forms: list[Any] = [{job.id}, (job.id,), np.array([job.id])]
    for ids in forms:
        assert client.retry_all(ids).refused[0].job_id == job.id


HEADERS: Final = {"webhook-id": "1", "webhook-timestamp": "1", "webhook-signature": "v1,YQ=="}
SECRET: Final = "whsec_bm90IGEgc2VjcmV0LCBhbiBleGFtcGxl"


@pytest.mark.parametrize("secret", [5, None, b"whsec_x", [5], [], "", "whsec_x", [SECRET, "x"]])
def test_a_wrong_secret_is_an_error_of_the_client(secret: Any) -> None:
    with pytest.raises(InvalidSecret):
        verify_webhook(secret, HEADERS, b"{}")


@pytest.mark.parametrize(
    "change",
    [
        {"headers": None},
        {"headers": {"webhook-id": 5}},
        {"headers": {5: 5}},
        {"body": None},
        {"body": {}},
        {"tolerance_seconds": "300"},
    ],
    ids=str,
)
def test_what_is_no_webhook_at_all_is_not_verified(change: dict[str, Any]) -> None:
    with pytest.raises(WebhookNotVerified):
        verify_webhook(**{"secret": SECRET, "headers": HEADERS, "body": b"{}", **change})
