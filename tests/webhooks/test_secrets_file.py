"""The file of webhook secrets: who may read it, what its lines mean, and that it is read again."""

import asyncio
import base64
import logging
import os
from pathlib import Path

import pytest

from asyncinfer.errors import SecretsFileRefused, WebhookRefused
from asyncinfer.webhooks.checks import WebhookChecks
from asyncinfer.webhooks.config import WebhookConfig
from asyncinfer.webhooks.secrets_file import Secrets, SecretsFile, read_secrets_file
from tests.faults.harness import eventually

KEYS = [bytes([number]) * 32 for number in range(20)]
SECRETS = ["whsec_" + base64.b64encode(key).decode() for key in KEYS]


def write(path: Path, content: str, mode: int = 0o600) -> Path:
    path.write_text(content)
    path.chmod(mode)
    return path


def test_a_host_has_its_own_secrets_and_the_others_those_of_all_hosts() -> None:
    secrets = Secrets.parse(
        f"""\
# tenant host secret
acme hooks.example.com {SECRETS[0]} since May
acme Hooks.Example.com {SECRETS[1]}
acme * {SECRETS[2]}

beta [2606:4700::1111] {SECRETS[3]}
""".encode()
    )
    assert not secrets.broken
    assert len(secrets) == 4
    assert secrets.keys_of("acme", "hooks.example.com") == (KEYS[0], KEYS[1])
    assert secrets.keys_of("acme", "other.example.com") == (KEYS[2],)
    assert secrets.keys_of("beta", "2606:4700::1111") == (KEYS[3],)
    assert secrets.keys_of("beta", "hooks.example.com") == ()


def test_a_host_is_one_that_a_url_may_have_in_any_of_its_forms() -> None:
    address = "2606:4700:4700::1111"
    for form in (
        address,
        f"[{address}]",
        "2606:4700:4700:0::1111",
        "[2606:4700:4700:0:0:0:0:1111]",
    ):
        secrets = Secrets.parse(f"acme {form} {SECRETS[0]}\n".encode())
        assert secrets.keys_of("acme", address) == (KEYS[0],), form
    for wrong in (
        *("hooks.example.com:8443", "hooks.example.com.", "hooks..example.com", "-.example.com"),
        *("127.1", "0x7f000001", "[127.0.0.1]", "fe80::1%eth0", f"[{address}]:8443", f"[{address}"),
        *("::g", "münchen.example", "*.example.com", "[]", "hooks.example.com/path"),
    ):
        secrets = Secrets.parse(f"\nacme {wrong} {SECRETS[0]}\n".encode())
        assert [line.number for line in secrets.broken] == [2], wrong
        assert "whsec" not in secrets.broken[0].reason


def test_a_broken_line_is_named_by_its_number_without_its_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many = "".join(f"acme many {secret}\n" for secret in SECRETS[:11])
    path = write(
        tmp_path / "secrets",
        f"""\
acme hooks.example.com {SECRETS[0][:-20]}
a/b hooks.example.com {SECRETS[0]}
acme https://hooks.example.com {SECRETS[0]}
acme {SECRETS[0]}
acme ok {SECRETS[0]}
acme ok {SECRETS[0]}
{many}""",
    )
    file = SecretsFile(path)
    assert [line.number for line in file.secrets.broken] == [1, 2, 3, 4, 6, 17]
    assert file.secrets.keys_of("acme", "ok") == (KEYS[0],)
    assert f"{path}, line 1 has no secret" in caplog.text
    assert "whsec_A" not in caplog.text
    assert SECRETS[0][6:20] not in caplog.text


def test_a_file_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for mode in (0o644, 0o602, 0o660):
        path = write(tmp_path / f"{mode:o}", f"acme * {SECRETS[0]}\n", mode)
        with pytest.raises(SecretsFileRefused, match="chmod 600"):
            SecretsFile(path)
    with pytest.raises(SecretsFileRefused, match="No such file"):
        SecretsFile(tmp_path / "absent")
    with pytest.raises(SecretsFileRefused, match="Is a directory"):
        read_secrets_file(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(SecretsFileRefused, match="not a file"):
        read_secrets_file(tmp_path / "fifo")
    with pytest.raises(SecretsFileRefused, match="more than"):
        read_secrets_file(write(tmp_path / "large", "#" * (4 << 20) + "##"))


async def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "secrets", f"acme * {SECRETS[0]}\n")
    file = SecretsFile(path, look_seconds=0.02)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(file.run())
        write(path, f"acme * {SECRETS[0]}\nacme * {SECRETS[1]}\n")
        await eventually(lambda: len(file.secrets) == 2, "the second secret is known")
        path.chmod(0o644)
        await eventually(lambda: "chmod 600" in caplog.text, "the mode is reported")
        assert file.secrets.keys_of("acme", "a.example") == (KEYS[0], KEYS[1])
        write(path, f"acme * {SECRETS[1]}\n")
        await eventually(lambda: len(file.secrets) == 1, "the first secret is gone")
        running.cancel()
    assert "Webhook secrets read again" in caplog.text


def test_a_file_that_is_still_being_written_is_not_used(tmp_path: Path) -> None:
    file = SecretsFile(write(tmp_path / "secrets", f"acme * {SECRETS[0]}\n"))
    written = f"acme * {SECRETS[1]}\nacme * {SECRETS[2]}\n".encode()
    for content in (written[:60], written[:70], written):
        file.update(content)
        assert file.secrets.keys_of("acme", "a.example") == (KEYS[0],)
    file.update(written)
    assert file.secrets.keys_of("acme", "a.example") == (KEYS[1], KEYS[2])


def test_where_keys_are_in_use_a_webhook_needs_a_secret(tmp_path: Path) -> None:
    path = write(tmp_path / "secrets", f"acme hooks.example.com {SECRETS[0]}\n")
    config = WebhookConfig(secrets=path)
    checks = WebhookChecks(config, needs_secret=True)
    assert checks.check("https://hooks.example.com/a", "acme").host == "hooks.example.com"
    for url, tenant in (
        ("https://hooks.example.com/a", "beta"),
        ("https://other.example.com/a", "acme"),
    ):
        with pytest.raises(WebhookRefused, match="WEBHOOK_SECRETS"):
            checks.check(url, tenant)
    WebhookChecks(config, needs_secret=False).check("https://other.example.com/a", "default")
    with pytest.raises(WebhookRefused, match="use https"):
        checks.check("http://hooks.example.com/a", "acme")
