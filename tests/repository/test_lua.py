"""Each script does what its header says, and says all it does."""

import ast
import inspect
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import redis

from asyncinfer.jobs import Facts
from asyncinfer.repository import keys
from asyncinfer.repository.scripts import NAMES, script

PACKAGE = Path(inspect.getfile(keys)).parents[1]
PRELUDES = ("_job", "_claim")


def source(name: str) -> str:
    return (files("asyncinfer.repository") / "lua" / f"{name}.lua").read_text()


def parted(name: str) -> tuple[str, str]:
    """A script's header (its first comment) and its body, without the shebang."""
    lines = source(name).split("\n")[1:]
    end = next(number for number, line in enumerate(lines) if not line.startswith("--"))
    return "\n".join(lines[:end]), "\n".join(lines[end:])


def section(name: str, word: str) -> str:
    """One section of a header: `-- KEYS    ...` and the lines indented below it."""
    header, _ = parted(name)
    found = re.search(rf"^-- {word} +(.*(?:\n--  +.*)*)", header, re.MULTILINE)
    return found[1].replace("\n--", " ") if found else ""


def code_of(text: str) -> str:
    """Lua without its comments."""
    return re.sub(r"--.*", "", text)


def test_every_script_is_listed_and_nothing_else_lies_beside_them() -> None:
    found = {one.name for one in (files("asyncinfer.repository") / "lua").iterdir()}
    assert found == {f"{name}.lua" for name in (*NAMES, *PRELUDES)}


@pytest.mark.parametrize("name", NAMES)
def test_a_header_names_the_verb_its_keys_arguments_and_answer(name: str) -> None:
    header, _ = parted(name)
    assert header.startswith(f"-- {name}: ")
    assert section(name, "KEYS")
    assert section(name, "ARGV").startswith("1 {")
    assert section(name, "Returns")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_used_by_number_is_documented_and_the_reverse(name: str) -> None:
    _, body = parted(name)
    used = {int(number) for number in re.findall(r"KEYS\[(\d+)\]", body)}
    documented = {int(number) for number in re.findall(r"(?:^|, )(\d+)", section(name, "KEYS"))}
    # A header without numbers speaks of a list of queues, which the body then goes through.
    assert used <= documented if documented else (not used and "KEYS" in body)
    assert not documented or max(documented) <= max(used) + 1


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_read_from_the_packed_ones_is_documented(name: str) -> None:
    _, body = parted(name)
    documented = re.findall(r"\w+", section(name, "ARGV"))
    read = set(re.findall(r"\ba\.(\w+)", code_of(body)))
    assert read <= set(documented)
    assert section(name, "ARGV").startswith("1 {}") != ("cmsgpack.unpack(ARGV[1])" in body)


@pytest.mark.parametrize("name", NAMES)
def test_every_word_a_script_answers_with_is_documented(name: str) -> None:
    header, body = parted(name)
    for word in re.findall(r"return '(\w+)'", code_of(body)):
        assert word in header, f"{name} returns {word!r}"


@pytest.mark.parametrize("name", NAMES)
def test_the_words_of_keys_are_those_that_python_builds(name: str) -> None:
    python = {
        function("{}").removeprefix("{{}}:")
        for function_name, function in inspect.getmembers(keys, inspect.isfunction)
        if list(inspect.signature(function).parameters) == ["q"] and function_name != "waiting"
    }
    python |= {"high", "low", "list"}
    text = code_of(script(name).text)
    assert set(re.findall(r"\bq\.(\w+)", text)) <= python
    assert set(re.findall(r"q\['(\w+):'", text)) <= {"claim", "idem"}


def test_every_key_of_a_queue_that_python_names_is_one_that_lua_uses() -> None:
    text = "".join(code_of(source(name)) for name in (*NAMES, *PRELUDES))
    for name, function in inspect.getmembers(keys, inspect.isfunction):
        if list(inspect.signature(function).parameters) == ["q"] and name != "waiting":
            word = function("").removeprefix("{}:")
            assert re.search(rf"\bq\.{word}\b", text), f"no script uses {word}"


def test_lua_builds_the_names_that_python_builds(server: redis.Redis) -> None:
    prelude = source("_job")
    names = server.eval(
        prelude
        + "local q = queue('a:b') return { q.list, q.high, q.low, q.running, q['claim:t'],"
        + " q['idem:k'], job('1', 'data') }",
        0,
    )
    high, normal, low = keys.waiting("a:b")
    assert [name.decode() for name in names] == [
        *(normal, high, low, keys.running("a:b"), keys.claim("a:b", "t")),
        *(keys.idempotency("a:b", "k"), keys.data("1")),
    ]


def test_the_letters_of_facts_are_those_of_the_record() -> None:
    text = "".join(code_of(source(name)) for name in (*NAMES, *PRELUDES))
    used = set(re.findall(r"\b(?:facts|known)\.(\w+)", text))
    assert used <= set(Facts.__struct_fields__)


@pytest.mark.parametrize("name", NAMES)
def test_all_but_submit_go_on_with_memory_full(name: str) -> None:
    shebang = source(name).split("\n", 1)[0]
    assert shebang == ("#!lua" if name == "submit" else "#!lua flags=allow-oom")


def functions_that_call() -> Counter[str]:
    """How many functions of the repository call each script."""
    calls: Counter[str] = Counter()
    for path in sorted((PACKAGE / "repository").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found = {
                    call.args[0].value
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Name)
                    and call.func.id == "script"
                    and isinstance(call.args[0], ast.Constant)
                }
                calls.update(str(name) for name in found)
    return calls


def test_every_script_is_called_by_exactly_one_function() -> None:
    assert functions_that_call() == Counter(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_script_is_called_from_outside_the_repository(name: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if not path.is_relative_to(PACKAGE / "repository"):
            assert f'script("{name}")' not in path.read_text(), path


@pytest.mark.parametrize("name", [*NAMES, *PRELUDES])
def test_lua_moves_and_python_builds(name: str) -> None:
    text = code_of(source(name))
    assert "cjson" not in text
    assert "KEYS *" not in text


@pytest.mark.parametrize("name", [*NAMES, *PRELUDES])
def test_lines_fit_the_page(name: str) -> None:
    assert all(len(line) <= 110 for line in source(name).split("\n"))


@pytest.mark.parametrize("name", NAMES)
def test_a_script_loads_and_its_digest_is_the_servers(server: redis.Redis, name: str) -> None:
    one = script(name)
    assert server.script_load(one.text) == one.sha
