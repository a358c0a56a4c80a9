"""What is said of a wrong query or body: the place and what is allowed there, without Python."""

import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlencode

import httpx2
import msgspec
import pytest
from msgspec import inspect

from asyncinfer.api.http.messages import read_query
from asyncinfer.api.routes import ROUTES
from asyncinfer.errors import InvalidQuery
from asyncinfer.schemas import requests

from .harness import ROW, assert_problem

FOREIGN: Final = re.compile(
    r"Invalid enum|\| null|`(str|int|float|bool|array|object)\b|regex|[\^$]|\(\?"
    r"|\b(str|int|dict|bool|tuple|None|NoneType|msgspec)\b"
)
"""What only who knows Python and msgspec would understand."""

TEXTS: Final = ("", "?", "-", "-1", "1e9", "nan", "1.5", "maybe", "null", "x" * 3000, "a\nb")
VALUES: Final[tuple[Any, ...]] = ("?", None, True, -1, 1.5, 10**30, [], ["?"], {"?": 1})
PARTS: Final = 3

Steps = tuple[str | int, ...]


def places(expected: inspect.Type, at: Steps = ()) -> Iterator[Steps]:
    """The places in a value of a type, from the outermost one inwards."""
    yield at
    match expected:
        case inspect.Metadata():
            yield from places(expected.type, at)
        case inspect.UnionType():
            for option in expected.types:
                yield from places(option, at)
        case inspect.StructType():
            yield from ((*at, "?"), *((*at, f"{field.encode_name}2") for field in expected.fields))
            for field in expected.fields:
                yield from places(field.type, (*at, field.encode_name))
        case inspect.ListType() | inspect.VarTupleType():
            yield from places(expected.item_type, (*at, 0))


def value_at(steps: Steps, value: Any) -> Any:
    """The smallest body that has the value at this place."""
    for step in reversed(steps):
        value = [value] if step == 0 else {step: value}
    return value


def query_problem(struct: type[msgspec.Struct], name: str, value: str) -> str:
    """What is wrong with a query of this one parameter; empty if nothing is."""
    try:
        read_query({"query_string": urlencode({name: value}).encode()}, struct)
    except InvalidQuery as error:
        return error.detail
    return ""


@pytest.mark.parametrize("struct", sorted({route.query for route in ROUTES}, key=str))
def test_no_message_on_a_query_speaks_python(struct: type[msgspec.Struct]) -> None:
    (*_, info) = inspect.multi_type_info([struct])
    assert isinstance(info, inspect.StructType)
    names = [field.encode_name for field in info.fields]
    problems = [query_problem(struct, name, text) for name in names for text in TEXTS]
    assert not [problem for problem in problems if FOREIGN.search(problem)]
    unknown = query_problem(struct, "?", "x")
    assert all(f"`{name}`" in unknown for name in names)


BODIES: Final[tuple[tuple[str, type[msgspec.Struct], dict[str, Any]], ...]] = (
    ("/predict", requests.TensorRequest, {"inputs": []}),
    ("/predict", requests.PredictRequest, {"data": ROW}),
    ("/jobs/retry", requests.RetryRequest, {}),
    ("/group/g/close", requests.CloseGroupRequest, {}),
)


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 2))])
@pytest.mark.parametrize(("path", "struct", "rest"), BODIES)
async def test_no_message_on_a_body_speaks_python(
    api: httpx2.AsyncClient,
    path: str,
    struct: type[msgspec.Struct],
    rest: dict[str, Any],
    part: int,
) -> None:
    """A part has some of the values at each place, and all parts have all."""
    # The options of both forms are the same.
    bodies = [
        value_at(steps, value)
        for number, steps in enumerate(places(inspect.type_info(struct)))
        for value in VALUES[(number + part) % PARTS :: PARTS]
        if "options" not in steps or "data" in rest
    ]
    for body in bodies:
        whole = {**rest, **body} if isinstance(body, dict) else body
        content = msgspec.json.encode(whole)
        reply = await api.post(path, content=content, headers={"content-type": "application/json"})
        if reply.status_code >= 400:
            problem = reply.json()
            faults = [problem["detail"], *(fault["detail"] for fault in problem.get("errors", ()))]
            assert not [fault for fault in faults if FOREIGN.search(fault)], (content, problem)


def test_every_pattern_is_described_in_words() -> None:
    structs = [struct for route in ROUTES for struct in (route.query, *route.bodies)]
    lines = [struct for route in ROUTES for struct in route.line_bodies]
    infos = inspect.multi_type_info([*structs, *lines])
    text = repr(infos)
    assert text.count("pattern='") == len(re.findall(r"pattern='[^']*'\), [^)]*'expected'", text))


@pytest.mark.parametrize(
    ("struct", "query", "detail"),
    [
        (
            requests.SubmitQuery,
            "priority=urgent",
            "Expected `high`, `low` or `normal`, got `urgent`.",
        ),
        (requests.SubmitQuery, "answer=csv", "Expected `json` or `tensors`, got `csv`."),
        (
            requests.JobsQuery,
            "status=foo",
            "Expected `cancelled`, `completed`, `failed`, `pending` or `processing`, got `foo`.",
        ),
        (requests.JobsQuery, "limit=0", "Expected a whole number from 1 to 1000."),
        (requests.JobsQuery, "dead=maybe", "Expected true or false."),
        (requests.WaitQuery, "wait=soon", "Expected a number from 0 to 60."),
        (
            requests.SubmitQuery,
            "start_within_seconds=0",
            "Expected a number above 0, at most 2592000.",
        ),
        (
            requests.EventsQuery,
            "group=-",
            "Expected a name of 1 to 128 letters, digits, `_`, `.`, `:` and `-` that begins with a "
            "letter or digit.",
        ),
        (requests.ReadyQuery, "to=submit", "There is no such name. Known: `for`."),
    ],
)
def test_a_query_is_told_what_is_allowed(
    struct: type[msgspec.Struct], query: str, detail: str
) -> None:
    with pytest.raises(InvalidQuery) as caught:
        read_query({"query_string": query.encode()}, struct)
    assert caught.value.detail == f"Query parameter `{query.partition('=')[0]}`: {detail}"


WRONG_OPTIONS: Final[list[tuple[dict[str, Any], str, str]]] = [
    ({"priority": "urgent"}, "priority", "Expected `high`, `low` or `normal`, got `urgent`."),
    (
        {"webhook": {"url": "https://a.example", "events": ["done"]}},
        "webhook/events/0",
        "Expected `cancelled`, `completed` or `failed`, got `done`.",
    ),
    (
        {"webhook": {"uri": "x"}},
        "webhook/uri",
        "There is no such name. Did you mean `url`? Known: `events`, `metadata`, `url`.",
    ),
    ({"webhook": {"url": ""}}, "webhook/url", "Expected a string of 1 to 2048 characters."),
    ({"webhook": []}, "webhook", "Expected an object, got a list."),
    (
        {"group": 5},
        "group",
        "Expected a name of 1 to 128 letters, digits, `_`, `.`, `:` and `-` "
        "that begins with a letter or digit, got a number.",
    ),
    (
        {"ttl_seconds": 1.5},
        "ttl_seconds",
        "Expected a whole number from 1 to 2592000, got a number with a decimal point.",
    ),
]


async def test_options_are_told_what_is_allowed(
    api: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for options, pointer, detail in WRONG_OPTIONS:
        with subtests.test(pointer):
            reply = await api.post("/predict", json={"data": ROW, "options": options})
            (fault,) = assert_problem(reply, 422, "invalid_input")["errors"]
            assert fault == {"pointer": f"/options/{pointer}", "detail": detail}


async def test_a_number_that_json_alone_can_hold_is_refused_at_its_place(
    api: httpx2.AsyncClient,
) -> None:
    webhook = b'{"url": "https://a.example", "metadata": {"deep": [{"x": 1e400}]}}'
    content = b'{"data": [[1, 2, 3, 4]], "options": {"webhook": %s}}' % webhook
    reply = await api.post(
        "/predict", content=content, headers={"content-type": "application/json"}
    )
    (fault,) = assert_problem(reply, 422, "invalid_input")["errors"]
    assert fault == {
        "pointer": "/options/webhook/metadata",
        "detail": "A number in it is too large.",
    }


async def test_the_webhook_of_a_group_has_names_of_its_own(api: httpx2.AsyncClient) -> None:
    webhook = {"url": "https://a.example", "events": ["completed"]}
    reply = await api.post("/group/g/close", json={"webhook": webhook})
    (fault,) = assert_problem(reply, 422, "invalid_input")["errors"]
    assert fault["pointer"] == "/webhook/events"
    assert fault["detail"].endswith("Known: `metadata`, `url`.")
