"""Which keys are valid while their file is edited, broken, removed and put back."""

import logging
from pathlib import Path

import pytest

from asyncinfer.api.key_file import KeyFile
from asyncinfer.api_keys import digest_of, entry_of
from asyncinfer.errors import KeyFileRefused

GONE = KeyFileRefused("Cannot read the API keys in keys: No such file or directory.")


def key_line(key: str, tenant: str = "acme") -> bytes:
    return entry_of(key, tenant, "read").line().encode() + b"\n"


class FollowedFile:
    """A followed key file with a clock that the test moves."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.now = 1000.0
        self.path = folder / "keys"
        self.path.write_bytes(content)
        self.file = KeyFile(self.path, clock=lambda: self.now)

    def update(self, content: bytes | KeyFileRefused, seconds: float = 0.0) -> None:
        """Reads this content every half second, for `seconds`."""
        until = self.now + seconds
        self.file.update(content)
        while self.now < until:
            self.now += 0.5
            self.file.update(content)

    def lets_in(self, *keys: str) -> bool:
        return all(self.file.keyring.caller_of(digest_of(key)) for key in keys)


@pytest.fixture
def followed(tmp_path: Path) -> FollowedFile:
    return FollowedFile(tmp_path, key_line("old"))


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.ERROR]


def test_a_content_is_used_once_it_is_unchanged_for_a_second(followed: FollowedFile) -> None:
    followed.update(b"", 0.5)
    assert followed.lets_in("old")
    followed.update(key_line("old")[:20], 0.5)
    assert followed.lets_in("old")
    followed.update(key_line("new"), 0.5)
    assert followed.lets_in("old")
    followed.update(key_line("new"), 0.5)
    assert followed.lets_in("new")
    assert not followed.lets_in("old")


def test_a_broken_line_beside_a_removal_does_not_keep_the_removed_key(
    followed: FollowedFile, caplog: pytest.LogCaptureFixture
) -> None:
    secret = b"acme read ai_a-key-in-the-clear\n"
    followed.update(key_line("new") + secret, 30)
    assert followed.lets_in("new")
    assert not followed.lets_in("old")
    (logged,) = errors(caplog)
    assert "line 2 lets nobody in: the third word must be the key's SHA-256" in logged
    assert "ai_" not in caplog.text


def test_a_file_of_broken_lines_writes_a_bounded_number_of_log_lines(
    followed: FollowedFile, caplog: pytest.LogCaptureFixture
) -> None:
    followed.update(b"nonsense\n" * 10_000, 2)
    assert not followed.lets_in("old")
    assert len(errors(caplog)) == 12
    assert "9990 more lines" in caplog.text


@pytest.mark.parametrize("content", [b"", b"# nobody\n", b"nonsense\n"])
def test_a_file_without_a_key_lets_nobody_in(
    followed: FollowedFile, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    followed.update(content, 1)
    assert len(followed.file.keyring) == 0
    assert "has no key, so nobody is let in" in caplog.text


def test_a_file_that_is_away_keeps_its_keys_for_a_minute_and_an_error_each_ten_seconds(
    followed: FollowedFile, caplog: pytest.LogCaptureFixture
) -> None:
    followed.update(GONE, 59.5)
    assert followed.lets_in("old")
    assert len(errors(caplog)) == 6
    assert "stay valid for 59 s" in errors(caplog)[0]
    followed.update(GONE, 1)
    assert not followed.lets_in("old")
    assert "No API key is accepted" in errors(caplog)[-1]
    followed.update(GONE, 50)
    assert len(errors(caplog)) == 7

    caplog.set_level(logging.INFO)
    followed.update(key_line("old"), 1)
    assert followed.lets_in("old")
    assert "can be read again" in caplog.text


def test_a_file_that_is_put_back_in_time_is_as_if_it_had_never_been_away(
    followed: FollowedFile, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        followed.update(GONE, 50)
        followed.update(key_line("old"))
        assert followed.lets_in("old")


def test_a_replacement_that_is_away_for_a_moment_is_no_error(
    followed: FollowedFile, caplog: pytest.LogCaptureFixture
) -> None:
    followed.update(GONE, 0.5)
    followed.update(key_line("new"), 1)
    assert followed.lets_in("new")
    assert errors(caplog) == []


def test_a_file_that_keeps_changing_does_not_keep_its_old_keys_forever(
    followed: FollowedFile, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(300):
        followed.update(key_line(f"key-{number}"))
        followed.now += 0.25
    assert len(followed.file.keyring) == 0
    assert "keep changing" in caplog.text
    followed.update(key_line("new"), 1)
    assert followed.lets_in("new")


def test_at_the_start_a_broken_line_is_left_out_and_an_absent_file_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert FollowedFile(tmp_path, b"nonsense\n" + key_line("a")).lets_in("a")
    assert "line 1 lets nobody in" in caplog.text
    with pytest.raises(KeyFileRefused, match="No such file"):
        KeyFile(tmp_path / "absent")
