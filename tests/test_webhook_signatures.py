"""Signatures of webhooks, compared with those of the library of Standard Webhooks."""

import base64
import doctest
import json
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from asyncinfer import webhook_signatures
from asyncinfer.client import WebhookNotVerified, verify_webhook
from asyncinfer.webhook_signatures import signed_headers, signing_key

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
OTHER = "whsec_" + base64.b64encode(b"o" * 24).decode()
BODY = json.dumps({"type": "job.completed", "data": {"result": "ü"}}).encode()


def headers_of(*secrets: str, body: bytes = BODY, age_seconds: int = 0) -> dict[str, str]:
    keys = [signing_key(secret) for secret in secrets]
    return signed_headers(keys, "msg_1_1_completed", body, int(time.time()) - age_seconds)


def test_the_library_of_standard_webhooks_accepts_each_signature() -> None:
    headers = headers_of(OTHER, SECRET)
    assert Webhook(SECRET).verify(BODY, headers) == json.loads(BODY)
    assert Webhook(OTHER).verify(BODY, headers) == json.loads(BODY)
    stranger = "whsec_" + base64.b64encode(b"s" * 32).decode()
    with pytest.raises(WebhookVerificationError):
        Webhook(stranger).verify(BODY, headers)


@settings(max_examples=25)
@given(
    key=st.binary(min_size=24, max_size=64),
    webhook_id=st.text(alphabet="abcdefghijklmnop0123456789_", min_size=1),
    body=st.text().map(lambda text: json.dumps({"x": text}, ensure_ascii=False).encode()),
)
def test_what_the_library_signs_is_verified(key: bytes, webhook_id: str, body: bytes) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    now = datetime.now(UTC)
    signature = Webhook(secret).sign(webhook_id, now, body.decode())
    headers = {
        "Webhook-Id": webhook_id,
        "Webhook-Timestamp": str(int(now.timestamp())),
        "Webhook-Signature": f"v1a,unknown {signature}",
    }
    assert verify_webhook([OTHER, secret], headers, body) == json.loads(body)
    ours = signed_headers([key], webhook_id, body, int(now.timestamp()))
    assert ours["webhook-signature"] == signature


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"webhook-signature": "v1,AAAA"}, "No signature"),
        ({"webhook-signature": "v2,AAAA v1 ,, v1,ä"}, "No signature"),
        ({"webhook-id": "msg_1_2_completed"}, "No signature"),
        ({"webhook-id": ""}, "no header webhook-id"),
        ({"webhook-timestamp": "now"}, "not a number"),
        ({"webhook-timestamp": "9" * 30}, "not a number"),
        ({"webhook-timestamp": "1"}, "more than 300 seconds"),
        ({"webhook-timestamp": "9999999999"}, "more than 300 seconds"),
    ],
)
def test_a_changed_webhook_is_not_verified(change: dict[str, str], message: str) -> None:
    with pytest.raises(WebhookNotVerified, match=message):
        verify_webhook(SECRET, headers_of(SECRET) | change, BODY)


def test_another_body_and_an_old_webhook_are_not_verified() -> None:
    with pytest.raises(WebhookNotVerified, match="No signature"):
        verify_webhook(SECRET, headers_of(SECRET), BODY + b" ")
    old = headers_of(SECRET, age_seconds=400)
    with pytest.raises(WebhookNotVerified, match="more than 300"):
        verify_webhook(SECRET, old, BODY)
    assert verify_webhook(SECRET, old, BODY, tolerance_seconds=500) == json.loads(BODY)
    with pytest.raises(WebhookNotVerified, match="JSON object"):
        verify_webhook(SECRET, headers_of(SECRET, body=b"[]"), b"[]")


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "a" * 40, "whsec_short", "whsec_" + "ä" * 40, "whsec_" + "A" * 200]
)
def test_a_wrong_secret_is_named_without_repeating_it(secret: str) -> None:
    with pytest.raises(ValueError, match="secret") as raised:
        verify_webhook(secret, headers_of(SECRET), BODY)
    assert not secret[6:] or secret[6:] not in str(raised.value)


def test_the_example_in_the_docstring_works() -> None:
    assert doctest.testmod(webhook_signatures).failed == 0
    assert doctest.testmod(webhook_signatures).attempted > 0
