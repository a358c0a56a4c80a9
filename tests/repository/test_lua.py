"""Each script does what its header says and says all it does, and includes just what it uses."""

import ast
import hashlib
import inspect
import itertools
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import redis

from asyncinfer.jobs import SCHEMA, Facts, Options, Record, Webhook
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import LIBRARY_PREFIX, NAMES, library, script
from asyncinfer.repository.submissions import NewJob, script_options

PACKAGE = Path(inspect.getfile(keys)).parents[1]

HOT = ("submit", "claim", "finish", "renew")
"""Called for every job; as a script, Redis creates each of its functions again for every call."""

MAX_UNUSED_FUNCTIONS = 2
MAX_UNUSED_FUNCTIONS_IF_HOT = 1

KEYWORDS = frozenset(
    (
        *("and", "break", "do", "else", "elseif", "end", "false", "for", "function", "if", "in"),
        *("local", "nil", "not", "or", "repeat", "return", "then", "true", "until", "while"),
    )
)
BUILTINS = frozenset(
    (
        *("redis", "cmsgpack", "struct", "KEYS", "ARGV", "math", "table", "ipairs", "pairs"),
        *("next", "pcall", "rawset", "setmetatable", "tonumber", "tostring", "type", "unpack"),
    )
)
"""The globals of Redis and of Lua that scripts use."""


def source(name: str) -> str:
    return (files("asyncinfer.repository") / "lua" / f"{name}.lua").read_text()


def part_names() -> list[str]:
    names = (path.name for path in (files("asyncinfer.repository") / "lua").iterdir())
    return sorted(name.removesuffix(".lua") for name in names if name.startswith("_"))


PARTS = part_names()


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
    """Lua without its comments and without its shebang."""
    return re.sub(r"--.*", "", re.sub(r"\A#!lua( flags=[a-z-]+)?", "", text))


def names_in(code: str) -> list[str]:
    """Every name in code that is no field, no method and in no string."""
    return re.findall(r"(?<![.:\w])[A-Za-z_]\w*", re.sub(r"'[^'\n]*'", "", code))


def defined_in(code: str) -> dict[str, bool]:
    """What code defines at its top level, by name; whether it is a function."""
    found = re.findall(r"^local (function )?(\w+)", code, re.MULTILINE)
    return {name: bool(function) for function, name in found}


def included_by(name: str) -> list[str]:
    lines = re.findall(r"^-- include: (.*)$", source(name), re.MULTILINE)
    return [f"_{part}" for line in lines for part in line.split()]


def definitions() -> dict[str, str]:
    """Each function and constant of a part, with the part."""
    return {name: part for part in PARTS for name in defined_in(code_of(source(part)))}


def test_every_script_is_listed_and_nothing_else_lies_beside_them() -> None:
    found = {path.name for path in (files("asyncinfer.repository") / "lua").iterdir()}
    assert found == {f"{name}.lua" for name in (*NAMES, *PARTS)}


# --- what a script includes ------------------------------------------------------------------


def test_no_two_parts_define_the_same_name() -> None:
    names = Counter(name for part in PARTS for name in defined_in(code_of(source(part))))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_script_and_a_part_include_each_part_they_use_and_no_other() -> None:
    part_of = definitions()
    offenders = {}
    for name in (*NAMES, *PARTS):
        used = {part_of[word] for word in names_in(code_of(source(name))) if word in part_of}
        if sorted(included_by(name)) != sorted(used - {name}):
            offenders[name] = f"uses {sorted(used - {name})}, includes {included_by(name)}"
    assert offenders == {}


def test_every_part_is_used() -> None:
    assert {part for name in (*NAMES, *PARTS) for part in included_by(name)} == set(PARTS)


def test_each_included_part_comes_once_and_behind_the_parts_that_it_includes() -> None:
    offenders = []
    for name in NAMES:
        text = script(name).text
        if "-- include:" in text:
            offenders.append(f"{name} has a line that includes a part")
        places = {}
        for part in all_included_by(name):
            # A part may begin with lines that include others.
            code = re.sub(r"^-- include: .*\n", "", source(part), flags=re.MULTILINE)
            places[part] = text.find(code)
            if text.count(code) != 1:
                offenders.append(f"{name} has {part} {text.count(code)} times")
        offenders += [
            f"{name} has {part} before {other}"
            for part, place in places.items()
            for other in included_by(part)
            if places[other] >= place
        ]
    assert offenders == []


def test_the_library_has_each_part_once_and_each_script_as_a_function() -> None:
    text = library().text
    code = {name: re.sub(r"^-- include: .*\n", "", source(name), flags=re.M) for name in PARTS}
    assert [name for name in PARTS if text.count(code[name]) != 1] == []
    bodies = {name: re.sub(r"^-- include: .*\n", "", parted(name)[1], flags=re.M) for name in NAMES}
    assert [name for name in NAMES if text.count(bodies[name]) != 1] == []
    registered = re.findall(r"^redis\.register_function\{ function_name = '(\w+)'", text, re.M)
    assert registered == [script(name).function for name in NAMES]


def test_the_name_of_the_library_changes_with_its_text() -> None:
    name, text = library().name, library().text
    assert re.fullmatch(f"{LIBRARY_PREFIX}[0-9a-f]{{16}}", name)
    unnamed = text.replace(name, "")
    assert name == LIBRARY_PREFIX + hashlib.sha256(unnamed.encode()).hexdigest()[:16]


def all_included_by(name: str) -> set[str]:
    """The parts that a script includes, and those that they include."""
    found = set(included_by(name))
    while new := {part for one in found for part in included_by(one)} - found:
        found |= new
    return found


def test_a_script_defines_nearly_nothing_that_it_does_not_use() -> None:
    offenders = {}
    for name in NAMES:
        code = code_of(script(name).text)
        counts = Counter(names_in(code))
        unused = {word: is_one for word, is_one in defined_in(code).items() if counts[word] == 1}
        functions = [word for word, is_function in unused.items() if is_function]
        # The names of facts come all together: a constant that no function uses costs nothing.
        constants = unused.keys() - {*functions, *fact_names()}
        most = MAX_UNUSED_FUNCTIONS_IF_HOT if name in HOT else MAX_UNUSED_FUNCTIONS
        if len(functions) > most or constants:
            offenders[name] = [*functions, *constants]
    assert offenders == {}


def test_a_script_uses_no_name_that_is_defined_nowhere() -> None:
    undefined = {name: undefined_in(code_of(script(name).text)) for name in NAMES}
    assert {name: words for name, words in undefined.items() if words} == {}


def undefined_in(code: str) -> set[str]:
    declared = set(KEYWORDS | BUILTINS)
    for names in re.findall(r"\blocal ([\w, ]+)", code):
        declared.update(re.findall(r"\w+", names))
    for names in re.findall(r"\bfunction\s*\w*\(([^)]*)\)", code):
        declared.update(re.findall(r"\w+", names))
    for names in re.findall(r"\bfor ([\w, ]+?) (?:=|in)", code):
        declared.update(re.findall(r"\w+", names))
    # A field of a table: `{ id = id, status = outcome }`.
    fields = set(re.findall(r"[{,]\s*(\w+) = ", code))
    return set(names_in(code)) - declared - fields


def test_a_comment_says_what_each_function_does() -> None:
    offenders = []
    for name in (*NAMES, *PARTS):
        for before, line in itertools.pairwise(source(name).split("\n")):
            if line.startswith("local function ") and not before.startswith("-- "):
                offenders.append(f"{name}: {line}")
    assert offenders == []


# --- the header ------------------------------------------------------------------------------


def test_a_header_names_the_verb_its_keys_arguments_and_answer() -> None:
    assert [
        name
        for name in NAMES
        if not (
            parted(name)[0].startswith(f"-- {name}: ")
            and section(name, "KEYS")
            and section(name, "ARGV").startswith("1 {")
            and section(name, "Returns")
        )
    ] == []


def test_a_part_says_what_it_is_about() -> None:
    texts = {
        name: re.sub(r"^-- include: .*\n", "", source(name), flags=re.MULTILINE) for name in PARTS
    }
    assert [name for name, text in texts.items() if not re.match(r"-- [A-Z].", text)] == []


def test_every_key_used_by_number_is_documented_and_the_reverse() -> None:
    offenders = {}
    for name in NAMES:
        _, body = parted(name)
        used = {int(number) for number in re.findall(r"KEYS\[(\d+)\]", body)}
        documented = {int(number) for number in re.findall(r"(?:^|, )(\d+)", section(name, "KEYS"))}
        if documented:
            agree = used <= documented and max(documented) <= max(used) + 1
        else:
            # A header without numbers speaks of a list of queues, which the body then goes through.
            agree = not used and "KEYS" in body
        if not agree:
            offenders[name] = f"uses {used}, documents {documented}"
    assert offenders == {}


def argument_words(name: str) -> set[str]:
    """The words in the braces of `1 {...}`."""
    return set(re.findall(r"\w+", section(name, "ARGV").partition("}")[0].removeprefix("1 {")))


def test_every_argument_read_from_the_packed_ones_is_documented() -> None:
    offenders = {}
    for name in NAMES:
        read = set(re.findall(r"\bargs\.(\w+)", code_of(script(name).text)))
        documented = argument_words(name)
        if "next" in documented:
            documented |= argument_words("claim")
        if read - documented:
            offenders[name] = f"reads {read - documented}"
        has_some = "{}" not in section(name, "ARGV")[:4]
        if has_some != ("cmsgpack.unpack(ARGV[1])" in source(name)):
            offenders[name] = "documents arguments and unpacks none, or the reverse"
    assert offenders == {}


def test_every_documented_argument_is_read_but_those_of_a_policy() -> None:
    """Python sends the whole of a policy's arguments to every script that ends jobs."""
    offenders = {}
    for name in NAMES:
        read = set(re.findall(r"\bargs\.(\w+)", code_of(script(name).text)))
        documented = re.findall(r"^1 \{([\w, ]*)", section(name, "ARGV"))[0]
        unread = set(re.findall(r"\w+", documented)) - read - set(Policy().end_arguments())
        if unread:
            offenders[name] = unread
    assert offenders == {}


def test_every_word_a_script_answers_with_is_documented() -> None:
    assert [
        f"{name} returns {word!r}"
        for name in NAMES
        for word in re.findall(r"return '(\w+)'", code_of(parted(name)[1]))
        if word not in parted(name)[0]
    ] == []


def test_the_options_that_python_packs_are_those_that_submit_documents_and_reads() -> None:
    options = Options(
        priority="high",
        delay_seconds=1,
        start_within_seconds=1,
        finish_within_seconds=1,
        ttl_seconds=1,
        group="g",
        webhook=Webhook(url="https://example.com"),
    )
    record = Record(
        SCHEMA, "q", "m", "default", 0, round=2, options=options, idempotency_digest="key"
    )
    packed = script_options(NewJob("id", "q", b"x", record, "inbox", "fingerprint"), "q")
    code = code_of(script("submit").text)
    assert set(re.findall(r"\boptions\.(\w+)", code)) == set(packed)
    documented = section("submit", "ARGV").partition("options:")[2]
    assert set(packed) <= set(re.findall(r"\w+", documented))


# --- keys and facts --------------------------------------------------------------------------


def words_of_keys() -> set[str]:
    """The words that may stand behind `q.`, as `_keys.lua` lists them."""
    found = re.search(r"^-- Words +(.*(?:\n--  +.*)*)", source("_keys"), re.MULTILINE)
    assert found
    return set(found[1].replace("\n--", " ").partition(";")[0].split())


def test_the_words_of_keys_are_those_that_python_builds(server: redis.Redis) -> None:
    python = {
        function("a:b")
        for name, function in inspect.getmembers(keys, inspect.isfunction)
        if list(inspect.signature(function).parameters) == ["q"] and name != "waiting"
    }
    high, _, low = keys.waiting("a:b")
    words = sorted(words_of_keys())
    names = "".join(f", q.{word}" for word in words)
    lua = server.eval(f"{source('_keys')} local q = queue('a:b') return {{ q.list{names} }}", 0)
    assert lua[0] == b"a:b"
    assert {name.decode() for name in lua[1:]} == python | {high, low}


def test_the_keys_that_scripts_use_are_those_that_are_listed() -> None:
    text = "".join(code_of(source(name)) for name in (*NAMES, *PARTS))
    # `q` and `default_q` hold the keys of a queue.
    assert set(re.findall(r"\b(?:\w+_)?q\.(\w+)", text)) == words_of_keys() | {
        "list",
        "closing",
        "closers",
    }
    assert set(re.findall(r"\bq\['(\w+):'", text)) == {
        *("claim", "idem", "webhook", "group", "closed"),
    }
    for names in re.findall(r"local ([\w, ]+) = queue\(", text):
        assert re.fullmatch(r"(?:\w+_)?q(, .*)?", names)


def test_lua_builds_the_names_that_python_builds(server: redis.Redis) -> None:
    digest = keys.group_digest("t", "g")
    names = server.eval(
        source("_keys")
        + source("_job_keys")
        + "local q = queue('a:b') return { q['claim:t'], q['idem:k'], q.closing, "
        + f"q['group:{digest}'], q['closed:{digest}'], job_key('1', 'data'), "
        + "unpack(job_keys({ '1', '2' }, ':status')) }",
        0,
    )
    assert [name.decode() for name in names] == [
        *(keys.claim("a:b", "t"), keys.idempotency("a:b", "k"), keys.closing("a:b")),
        *(keys.group("a:b", "t", "g"), keys.closed_group("a:b", "t", "g"), keys.data("1")),
        *(keys.status("1"), keys.status("2")),
    ]


def fact_names() -> dict[str, str]:
    return dict(re.findall(r"^local (\w+) = '(\w)'$", source("_fact_names"), re.MULTILINE))


def test_the_names_and_letters_of_facts_are_those_of_the_record() -> None:
    letters = zip(Facts.__struct_fields__, Facts.__struct_encode_fields__, strict=True)
    assert fact_names() == {field.upper(): letter for field, letter in letters}


def test_facts_are_named_by_nothing_but_their_names() -> None:
    text = "".join(code_of(source(name)) for name in (*NAMES, *PARTS))
    assert set(re.findall(r"\bfacts\[([^\]]*)\]", text)) == {*fact_names(), "i", "name"}
    assert re.findall(r"(?<!q\.)\bfacts\.\w+", text.replace("q.facts", "")) == []


# --- the rules of all ------------------------------------------------------------------------


def test_all_but_submit_go_on_with_memory_full_and_readers_where_no_write_is_allowed() -> None:
    shebangs = {name: source(name).split("\n", 1)[0] for name in NAMES}
    assert shebangs.pop("submit") == "#!lua"
    assert {shebangs.pop(name) for name in ("gauge", "tally", "look")} == {"#!lua flags=no-writes"}
    assert {*shebangs.values()} == {"#!lua flags=allow-oom"}, shebangs


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


def test_no_script_is_called_from_outside_the_repository() -> None:
    assert [
        f"{path} calls {name}"
        for path in PACKAGE.rglob("*.py")
        if not path.is_relative_to(PACKAGE / "repository")
        for name in re.findall(r'script\("(\w+)"\)', path.read_text())
        if name in NAMES
    ] == []


def test_lua_moves_and_python_builds() -> None:
    assert [
        f"{name}: {word}"
        for name in (*NAMES, *PARTS)
        for word in ("cjson", "KEYS *")
        if word in code_of(source(name))
    ] == []


def test_lines_fit_the_page() -> None:
    assert [
        f"{name}: {line}"
        for name in (*NAMES, *PARTS)
        for line in source(name).split("\n")
        if len(line) > 110
    ] == []


def test_a_script_loads_and_its_digest_is_the_servers(server: redis.Redis) -> None:
    digests = {name: server.script_load(script(name).text) for name in NAMES}
    assert digests == {name: script(name).sha for name in NAMES}


# --- printed ---------------------------------------------------------------------------------


def run_scripts(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncinfer.repository.scripts", *arguments]
    return subprocess.run(command, capture_output=True, check=False, text=True)


def test_the_text_that_redis_runs_can_be_printed() -> None:
    printed = run_scripts("claim")
    assert (printed.returncode, printed.stdout) == (0, script("claim").text)


def test_the_scripts_are_listed_with_their_digests() -> None:
    listed = run_scripts()
    assert listed.returncode == 0
    assert listed.stdout.splitlines() == [
        f"{library().name}  library",
        *(f"{script(name).sha}  {name}" for name in NAMES),
    ]


def test_the_library_that_redis_loads_can_be_printed() -> None:
    printed = run_scripts("library")
    assert (printed.returncode, printed.stdout) == (0, library().text)


def test_an_unknown_script_exits_with_2_and_the_names() -> None:
    refused = run_scripts("claims")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "'claims'" in refused.stderr
    assert all(name in refused.stderr for name in NAMES)
