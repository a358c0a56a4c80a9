"""The docstrings of the client: they say what a method returns and raises, and examples work."""

import doctest
import inspect
import re
from typing import Any, Final

import msgspec
import pytest

from asyncinfer import client as public
from asyncinfer import errors
from asyncinfer.client import AsyncClient, AsyncGroup, AsyncJob, Client, Group, Job

ANSWERS = tuple(kind for kind in vars(public).values() if isinstance(kind, msgspec.StructMeta))
PLAIN = (Client, Job, Group, *ANSWERS)
FLOWER: Final = [[5.1, 3.5, 1.4, 0.2]]
PAIRS = ((Client, AsyncClient), (Job, AsyncJob), (Group, AsyncGroup))


def _examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder()
    return [example for kind in PLAIN for example in finder.find(kind) if example.examples]


def test_each_example_gives_what_it_shows(client: Client) -> None:
    failures: list[str] = []
    runner = doctest.DocTestRunner()
    for example in _examples():
        example.globs = {"client": client}
        runner.run(example, out=failures.append)

    assert "".join(failures) == ""


def test_each_method_has_an_example() -> None:
    shown = {example.name for example in _examples()}
    methods = [
        f"{kind.__name__}.{name}"
        for kind in (Client, Job, Group)
        for name, _ in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name in vars(kind) and name != "close"
    ]
    assert [name for name in methods if name not in shown] == []


def test_all_that_is_public_has_a_docstring() -> None:
    own = [kind for kind in vars(public).values() if inspect.isclass(kind)]
    nameless = [kind.__name__ for kind in own if not kind.__doc__ and kind not in _server_errors()]
    nameless += [
        f"{kind.__name__}.{name}"
        for kind in (*PLAIN, AsyncClient, AsyncJob, AsyncGroup)
        for name, member in inspect.getmembers(kind)
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property))
        and not member.__doc__
    ]
    assert nameless == []


def _server_errors() -> list[type]:
    """Their names and titles say all."""
    return [kind for kind in vars(errors).values() if inspect.isclass(kind)]


@pytest.mark.parametrize(("plain", "asynchronous"), PAIRS)
def test_help_of_an_asynchronous_method_is_that_of_the_plain_one(
    plain: type, asynchronous: type
) -> None:
    for name, method in inspect.getmembers(asynchronous, inspect.isfunction):
        if not name.startswith("_") and name in vars(plain):
            text = inspect.getdoc(vars(plain)[name])
            assert text
            assert (inspect.getdoc(method) or "").startswith(text)


def test_each_error_that_a_docstring_names_can_be_imported_from_the_client() -> None:
    texts = [
        inspect.getdoc(member) or ""
        for kind in PLAIN
        for name, member in (("", kind), *vars(kind).items())
        if not name.startswith("_")
    ]
    prose = [line for text in texts for line in text.splitlines() if ">>>" not in line]
    names = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)+\b", "\n".join(prose)))

    assert {"InvalidInput", "WaitTimeout", "ConnectionFailed"} <= names
    assert names - set(public.__all__) == set()


def test_each_field_of_an_answer_is_named_in_a_docstring(client: Client) -> None:
    job = client.submit(FLOWER, "iris", group="keys").wait()
    answers: list[tuple[object, dict[str, Any]]] = [
        (public.ValidInput, client.request("POST", "/models/iris/validate", body={"data": FLOWER})),
        (public.RetriedJobs, client.request("POST", "/jobs/retry", body={"job_ids": [job.id]})),
        (public.ClearedJobs, client.request("DELETE", "/jobs", group="keys")),
        (public.PausedState, client.request("POST", "/models/iris/resume")),
        (public.Health, client.request("GET", "/health")),
        (Client.queues, client.request("GET", "/queues")["queues"][0]),
        (public.AuditLog, client.request("GET", "/audit")),
        (public.AuditEntry, client.request("GET", "/audit")["entries"][0]),
        (Client.workers, client.request("GET", "/workers")["workers"][0]),
        (Job.as_dict, job.as_dict()),
        (Group.as_dict, client.group("keys").as_dict()),
    ]
    for described, answer in answers:
        named = set(re.findall(r"`(\w+)`", described.__doc__ or ""))
        assert set(answer) - named - {"more", "valid", "cursor"} == set(), described
