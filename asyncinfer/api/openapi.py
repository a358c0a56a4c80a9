"""The OpenAPI 3.1 document of the route table."""

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from inspect import getdoc
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer import __version__
from asyncinfer.api.http.body import NDJSON
from asyncinfer.api.routes import EVERYWHERE, Route
from asyncinfer.errors import Forbidden, RequestError, Unauthorized
from asyncinfer.schemas.problems import Problem
from asyncinfer.schemas.requests import QUERY_OBJECTS
from asyncinfer.schemas.webhooks import JOB_EVENTS, GroupEvent

_Schema = dict[str, Any]

_ANY: Final[_Schema] = {}
_REF: Final = "#/components/schemas/{name}"
_SECURITY: Final = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def document(routes: Sequence[Route]) -> bytes:
    """The OpenAPI document of the routes, as JSON."""
    bodies = _bodies(routes)
    schemas, components = msgspec.json.schema_components(bodies, ref_template=_REF)
    by_struct = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, _Schema] = {}
    for route in routes:
        operation = _operation(route, by_struct)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "asyncinfer",
                "version": __version__,
                "description": "Any ONNX model behind a durable job queue.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "webhooks": {
                "jobEnded": _webhook(
                    "Tells the end of a job to the URL of its option `webhook`.",
                    [by_struct[event] for event in JOB_EVENTS],
                ),
                "groupEnded": _webhook(
                    "Tells that all jobs of a closed group have ended to the URL of its webhook.",
                    [by_struct[GroupEvent]],
                ),
            },
            "components": {"schemas": components, "securitySchemes": _SECURITY},
        }
    )


def _bodies(routes: Iterable[Route]) -> list[type[Struct]]:
    """Every struct that is the body, or a line of the body, of a request or answer: once, in the
    order of the routes, after Problem and the bodies of webhooks."""
    structs: dict[type[Struct], None] = dict.fromkeys((Problem, *JOB_EVENTS, GroupEvent))
    for route in routes:
        lines = (*route.line_bodies, *route.line_answers)
        structs |= {body: None for body in (*route.bodies, *route.answers.values(), *lines) if body}
    return list(structs)


def _webhook(summary: str, schemas: Sequence[_Schema]) -> _Schema:
    """What the service sends to receivers; `schemas` are those of the bodies."""
    content = {"application/json": {"schema": {"oneOf": schemas}}}
    operation = {
        "summary": summary,
        "requestBody": {"required": True, "content": content},
        "responses": {
            "2XX": {"description": "It is delivered."},
            "410": {"description": "It is not tried again. After any other answer it is."},
        },
    }
    return {"post": operation}


def _operation(route: Route, schemas: dict[type[Struct], _Schema]) -> _Schema:
    """A route's operation object; `schemas` has the schema of each struct. Its summary is the first
    line of the handler's docstring."""
    operation: _Schema = {
        "operationId": _operation_id(route),
        "summary": (getdoc(route.handler) or "").partition("\n")[0],
        "parameters": _parameters(route),
        "responses": {
            **{str(status): _answer(route, status, schemas) for status in route.answers},
            **_problems(route, schemas[Problem]),
        },
    }
    if route.bodies:
        alternatives = {"oneOf": [schemas[body] for body in route.bodies]}
        content = {
            "application/json": {"schema": alternatives},
            **_binary(route.binary_bodies),
            **_lines(route.line_bodies, schemas),
        }
        operation["requestBody"] = {"required": route.body_required, "content": content}
    if route.scope:
        operation["security"] = [{"bearer": []}, {"header": []}, {}]
    return operation


def _operation_id(route: Route) -> str:
    """The handler's name, with a suffix for the second path of a handler that serves two."""
    *_, last = route.path.split("/")
    name: str = getattr(route.handler, "__name__", "")
    return f"{name}_{last[1:-1]}" if last == "{model}" and name == "predict" else name


def _answer(route: Route, status: int, schemas: dict[type[Struct], _Schema]) -> _Schema:
    """The response object of one status of a route."""
    if status == HTTPStatus.NO_CONTENT:
        return {"description": "There are no more events."}
    body = route.answers[status]
    binary = route.binary_answers if status == HTTPStatus.OK else ()
    if route.media_type != "application/json":
        return {"description": HTTPStatus(status).phrase, "content": {route.media_type: {}}}
    schema = schemas[body] if body else _ANY if binary else {"type": "object"}
    lines = _lines(route.line_answers, schemas) if status == HTTPStatus.OK else {}
    return {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": schema}, **_binary(binary), **lines},
    }


def _binary(media_types: Iterable[str]) -> dict[str, _Schema]:
    """Media types without a schema, since OpenAPI 3.1 has none for bytes."""
    return {media_type: {} for media_type in media_types}


def _lines(structs: Sequence[type[Struct]], schemas: dict[type[Struct], _Schema]) -> _Schema:
    """The content of a bulk body: the schema of one line, since OpenAPI 3.1 cannot describe a
    sequence of JSON texts. Empty without structs."""
    if not structs:
        return {}
    alternatives = [schemas[struct] for struct in structs]
    return {NDJSON: {"schema": {"description": "The schema of each line.", "oneOf": alternatives}}}


def _problems(route: Route, schema: _Schema) -> dict[str, _Schema]:
    """Response objects of errors by status, each with the codes that it may have. `schema` is
    Problem's."""
    errors: list[type[RequestError]] = [*EVERYWHERE, *route.all_errors]
    if route.scope:
        errors += [Unauthorized, Forbidden]
    by_status: dict[int, list[str]] = {}
    for error in errors:
        by_status.setdefault(error.status, []).append(f"`{error.code}`: {error.title}.")
    return {
        str(status): {
            "description": " ".join(lines),
            "content": {"application/problem+json": {"schema": schema}},
        }
        for status, lines in sorted(by_status.items())
    }


def _in_query(name: str, schema: _Schema) -> _Schema:
    """The schema of a query parameter: of an option that is an object, that of its one member."""
    if name not in QUERY_OBJECTS:
        return schema
    described = f"The `{QUERY_OBJECTS[name]}` of this option, which is an object in a body."
    return {"type": "string", "description": described}


def _parameters(route: Route) -> list[_Schema]:
    """Parameter objects of the names in braces in the path, of the fields of the query, and of the
    headers that the route reads."""
    query = msgspec.json.schema(route.query)["$defs"][route.query.__name__]["properties"]
    return [
        *(
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", route.path)
        ),
        *(
            {"name": name, "in": "query", "required": False, "schema": _in_query(name, schema)}
            for name, schema in query.items()
        ),
        *(
            {
                "name": header.name,
                "in": "header",
                "required": False,
                "description": header.description,
                "schema": {"type": "string", "pattern": header.pattern},
            }
            for header in route.headers
        ),
    ]
