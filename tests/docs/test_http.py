"""The page on the HTTP API: routes, parameters, fields, codes and limits are those of the code."""

import re
from functools import cache
from typing import Final, NamedTuple, get_args, get_type_hints

import msgspec
import pytest
from msgspec import Struct

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.connection import RESERVED_CONNECTIONS
from asyncinfer.api.routes import EVERYWHERE, ROUTES, Route
from asyncinfer.errors import JobError, RedisUnavailable, RequestError
from asyncinfer.schemas.operations import AuditEntry, Queue, Worker
from asyncinfer.schemas.problems import LineProblem
from asyncinfer.schemas.requests import AuditQuery, InputTensor, JobsQuery, RequestOptions
from asyncinfer.schemas.responses import (
    AcceptedJob,
    ClearResult,
    Group,
    Job,
    Model,
    Scale,
    WaitingFor,
)
from asyncinfer.tensors.datatypes import DTYPES
from tests.docs.markdown import page
from tests.process import REPOSITORY

PAGE: Final = page("http.md")
OPTIONS: Final = "[the options](#options)"
BULK_ONLY: Final = {"group_not_closed", "too_many_refused_lines"}
MONITOR_ONLY: Final = {"not_ready"}

_FACTS: Final = re.compile(
    r"(?:(?P<routes>`[^:]+|Both|Each): )?Query: (?P<query>[^.]+)\."
    r"(?: Headers: (?P<headers>[^.]+)\.)? Answers: (?P<answers>[^.]+)\. Errors: (?P<errors>[^.]+)\."
)

# --- routes --------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """The words in backticks."""
    return re.findall(r"`([\w.-]+)`", text)


def routes_in(text: str) -> list[str]:
    return re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", text)


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


def test_the_table_has_every_route_with_its_scope() -> None:
    shown: list[tuple[str, str | None]] = []
    table = PAGE._replace(text=PAGE.text.partition("## Conventions")[0])
    for cell, scope, _ in table.rows()[1:]:
        routes, scopes = routes_in(cell), names(scope)
        if len(scopes) == len(routes):
            shown += zip(routes, scopes, strict=True)
        else:
            shown += [(route, scopes[0] if scopes else None) for route in routes]
    assert len(shown) == len(set(shown))
    assert set(shown) == {(name_of(route), route.scope) for route in ROUTES}


class Facts(NamedTuple):
    """What the page says of a route."""

    query: set[str]
    headers: set[str]
    answers: list[int]
    errors: set[str]


@cache
def facts_by_route() -> dict[str, Facts]:
    """The facts of each route: those of a sentence that names it, else of the section that has its
    name in backticks."""
    found: dict[str, Facts] = {}
    for section in re.split(r"^##+ ", PAGE.text, flags=re.MULTILINE)[1:]:
        sentences = [
            match
            for paragraph in section.split("\n\n")
            for match in _FACTS.finditer(" ".join(paragraph.split()))
        ]
        for match in sentences:
            for route in routes_in(match["routes"] or "") or routes_in(section):
                found.setdefault(route, _facts(match))
    return found


def _facts(match: re.Match[str]) -> Facts:
    query = match["query"]
    options = RequestOptions.__struct_fields__ if query.startswith(OPTIONS) else ()
    return Facts(
        {*options, *names(query)},
        set(names(match["headers"] or "")),
        [int(status) for status in match["answers"].split(", ")],
        set(names(match["errors"])),
    )


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
def test_the_page_has_the_parameters_statuses_and_errors_of_the_route(route: Route) -> None:
    accept = {"Accept"} if route.binary_answers else set()
    assert facts_by_route()[name_of(route)] == Facts(
        {field.encode_name for field in msgspec.structs.fields(route.query)},
        {header.name for header in route.headers} | accept,
        list(route.answers),
        {error.code for error in route.all_errors} - {RedisUnavailable.code},
    )


def test_every_route_or_a_named_one_may_answer_each_error() -> None:
    (sentence,) = re.findall(r"Every route may answer (.*?)\.", PAGE.text, re.DOTALL)
    everywhere = set(names(sentence))
    of_routes = {error.code for route in ROUTES for error in route.all_errors}
    assert {error.code for error in EVERYWHERE} <= everywhere
    assert everywhere | of_routes | BULK_ONLY | MONITOR_ONLY == {
        error.code for error in request_errors()
    }


# --- codes ---------------------------------------------------------------------------------


def request_errors() -> set[type[RequestError]]:
    """The errors of the API; the client has more."""
    errors: set[type[RequestError]] = {RequestError, *_below(RequestError)}
    return {error for error in errors if error.__module__ == RequestError.__module__}


def _below(error: type[RequestError]) -> list[type[RequestError]]:
    return [one for below in error.__subclasses__() for one in (below, *_below(below))]


def test_the_table_of_errors_has_every_code_with_its_status() -> None:
    rows = [row for row in PAGE.section("Errors").rows() if row[0].isdigit()]
    shown = [(names(code)[0], int(status)) for status, code, *_ in rows]
    assert len(shown) == len(set(shown))
    assert set(shown) == {(error.code, error.status) for error in request_errors()}
    assert [status for _, status in shown] == sorted(status for _, status in shown)


def test_the_table_of_failures_has_every_code_that_ends_a_job() -> None:
    rows = PAGE.section("Why a job failed").rows()[1:]
    scripts = (REPOSITORY / "asyncinfer" / "repository" / "lua").glob("*.lua")
    of_scripts = {
        code
        for script in scripts
        for code in re.findall(r"'([a-z_]+)',\s*'[A-Z]", script.read_text())
    }
    assert of_scripts
    assert {names(row[0])[0] for row in rows} == {
        *(error.code for error in JobError.__subclasses__()),
        *of_scripts,
        "invalid_input",
        "unknown",
    }


def test_the_table_of_reasons_to_wait_has_every_code() -> None:
    codes = get_args(get_type_hints(WaitingFor)["code"])
    rows = PAGE.section("Why a job waits").rows()[1:]
    assert sorted(names(row[0])[0] for row in rows) == sorted(codes)


# --- fields --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "title", "struct"),
    [
        ("Submit a job", "field of the 202", AcceptedJob),
        ("The input", "member of `inputs[]`", InputTensor),
        ("Options", "option", RequestOptions),
        ("Read a job", "field of a job", Job),
        ("List jobs", "parameter", JobsQuery),
        ("Cancel or delete many jobs", "field", ClearResult),
        ("Groups", "field of a group", Group),
        ("Models", "field of a model", Model),
        ("Queues and workers", "field of a queue", Queue),
        ("Queues and workers", "field of a worker", Worker),
        ("The audit log", "parameter", AuditQuery),
        ("The audit log", "field of an entry", AuditEntry),
        ("The backlog for an autoscaler", "field", Scale),
        ("Errors", "member", LineProblem),
    ],
)
def test_the_table_has_every_field(section: str, title: str, struct: type[Struct]) -> None:
    table = PAGE.section(section).text.partition(f"| {title} |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE)
    shown = [name for cell in cells for name in names(cell)]
    assert sorted(shown) == sorted(struct.__struct_fields__)


def test_every_datatype_is_in_the_table_with_its_numpy_name_and_size() -> None:
    table = [row for row in PAGE.section("Datatypes").rows() if row[0].startswith("`")]
    shown = {row[1].strip("`"): re.findall(r"`(\w+)`", row[2])[0] for row in table}
    sizes = {row[1].strip("`"): int(row[3].partition(":")[0].partition(" ")[0]) for row in table}

    assert shown == {name: str(dtype) for name, dtype in DTYPES.items()}
    assert all(sizes[name] == DTYPES[name].itemsize for name in sizes if name != "BYTES")


def test_the_limits_are_those_of_the_code() -> None:
    config = ApiConfig(redis_url="")
    (row,) = [row for row in PAGE.section("Limits").rows() if row[0].startswith("connections")]
    assert [int(number) for number in re.findall(r"\d+", row[1])] == [
        config.max_connections,
        config.max_streams,
        RESERVED_CONNECTIONS,
    ]
    limits = dict(PAGE.section("Limits").rows()[1:])
    head = f"{config.max_header_bytes >> 10} KiB, within {config.header_timeout_seconds:g} s"
    assert limits["the head of a request"] == head
    assert limits["the rest of a request"].startswith(f"within {config.body_timeout_seconds:g} s")
