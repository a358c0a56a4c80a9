"""API keys identify a tenant and its scopes; broken lines of their file are reported."""

import hashlib
import os
from pathlib import Path

import pytest

from asyncinfer import api_keys
from asyncinfer.api_keys import Caller, Keyring, digest_of
from asyncinfer.errors import KeyFileRefused

DIGEST = hashlib.sha256(b"a").hexdigest()


def key_file(folder: Path, *lines: str) -> Path:
    path = folder / "keys"
    path.write_text("\n".join(lines))
    return path


def line(key: str, tenant: str = "acme", scopes: str = "submit,read") -> str:
    return api_keys.entry_of(key, tenant, scopes).line()


def test_a_key_has_256_random_bits_and_our_prefix() -> None:
    key, other = api_keys.new_key(), api_keys.new_key()

    assert key.startswith("ai_")
    assert len(key) == 46
    assert key != other


def test_a_key_names_its_tenant_and_scopes(tmp_path: Path) -> None:
    key = api_keys.new_key()
    path = key_file(tmp_path, "# keys", "", f"{line(key, 'acme', 'read,submit')} the laptop's")

    caller = Keyring.load(path).caller_of(digest_of(key))

    assert caller == Caller("acme", frozenset({"submit", "read"}))


def test_the_file_does_not_hold_the_key() -> None:
    key = api_keys.new_key()

    assert key not in line(key)
    assert line(key).split() == ["acme", "submit,read", hashlib.sha256(key.encode()).hexdigest()]


def test_admin_brings_no_other_scope(tmp_path: Path) -> None:
    caller = Keyring.load(key_file(tmp_path, line("k", scopes="admin"))).caller_of(digest_of("k"))

    assert caller is not None
    assert caller.scopes == {"admin"}


def test_a_tenant_changes_its_key_without_a_gap(tmp_path: Path) -> None:
    old, new = api_keys.new_key(), api_keys.new_key()
    keyring = Keyring.load(key_file(tmp_path, line(old), line(new)))

    assert keyring.caller_of(digest_of(old)) == keyring.caller_of(digest_of(new))


@pytest.mark.parametrize("key", ["", "ai_", "ai_\xff\udcff", DIGEST, "a" * 100_000])
def test_an_unknown_key_has_no_caller(tmp_path: Path, key: str) -> None:
    assert Keyring.load(key_file(tmp_path, line("a"))).caller_of(digest_of(key)) is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("acme", "scopes are submit, read, admin, operator"),
        (f"acme submit,write {DIGEST}", "scopes are submit, read, admin, operator"),
        (f"acme submit, read {DIGEST}", "scopes are submit, read, admin, operator"),
        (f"a/b submit {DIGEST}", "a tenant is"),
        ("acme submit ai_a-key-in-the-clear", "the third word must be the key's SHA-256"),
        (f"acme submit {DIGEST.upper()}", "the third word must be the key's SHA-256"),
        (line("b", tenant="other"), "it repeats the key of an earlier line"),
    ],
)
def test_only_a_broken_line_is_ignored_and_it_is_named_by_its_number(
    tmp_path: Path, wrong: str, reason: str
) -> None:
    path = key_file(tmp_path, line("b"), wrong, line("c"))

    keyring = Keyring.load(path)

    assert [broken.number for broken in keyring.broken] == [2]
    assert keyring.broken[0].reason.startswith(reason)
    assert "ai_" not in keyring.broken[0].reason
    assert keyring.caller_of(digest_of("a")) is None
    for key in ("b", "c"):
        assert keyring.caller_of(digest_of(key)) == Caller("acme", frozenset({"submit", "read"}))


def test_bytes_that_are_not_utf8_break_only_their_own_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbf" + line("a").encode() + b"\r\n\xff\xfe\r\n# \xff\r\n")

    keyring = Keyring.load(path)

    assert keyring.caller_of(digest_of("a")) is not None
    assert [(broken.number, broken.reason) for broken in keyring.broken] == [(2, "it is not UTF-8")]


@pytest.mark.parametrize("content", [b"", b"# soon\n", b"\n\n", b"\xff\xfe"])
def test_a_file_without_keys_lets_nobody_in(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)

    keyring = Keyring.load(path)

    assert len(keyring) == 0
    assert keyring.caller_of(digest_of("")) is None


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileRefused, match="No such file"):
        Keyring.load(tmp_path / "keys")


def test_a_folder_a_pipe_and_a_huge_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)

    for path in (tmp_path, tmp_path / "pipe", tmp_path / "huge"):
        with pytest.raises(KeyFileRefused, match=str(path)):
            Keyring.load(path)


@pytest.mark.parametrize(("tenant", "scopes"), [("", "read"), ("a b", "read"), ("a", "")])
def test_no_line_is_made_that_could_not_be_read(tenant: str, scopes: str) -> None:
    with pytest.raises(ValueError, match=r"tenant|scopes"):
        api_keys.entry_of(api_keys.new_key(), tenant, scopes)
