"""Signatures of webhooks, as Standard Webhooks describes them (https://www.standardwebhooks.com)."""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Final

import msgspec

from asyncinfer.errors import InvalidSecret, WebhookNotVerified

SECRET_PREFIX: Final = "whsec_"
_MIN_KEY_BYTES: Final = 24
_MAX_KEY_BYTES: Final = 64
_VERSION: Final = "v1"
_MAX_SIGNATURES: Final = 100
"""How many signatures of one message are compared; a sender has two while a secret rotates."""


def signing_key(secret: str) -> bytes:
    """The key of a secret: `whsec_` and 24 to 64 bytes in base64, with or without padding. Raises
    ValueError, whose message does not repeat the secret."""
    encoded = secret.removeprefix(SECRET_PREFIX)
    if encoded == secret:
        raise ValueError(f"a secret begins with `{SECRET_PREFIX}`")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"a secret is `{SECRET_PREFIX}` and base64") from None
    if not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
        raise ValueError(
            f"a secret has {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} bytes, and this one {len(key)}"
        )
    return key


def signed_headers(
    keys: Sequence[bytes], webhook_id: str, body: bytes, at_seconds: int
) -> dict[str, str]:
    """The headers of a webhook that is sent at `at_seconds` since 1970, with a signature by each
    key; without a key there is no signature."""
    headers = {"webhook-id": webhook_id, "webhook-timestamp": str(at_seconds)}
    if keys:
        signed = _signed_content(webhook_id, str(at_seconds), body)
        headers["webhook-signature"] = " ".join(
            f"{_VERSION},{base64.b64encode(_signature(key, signed)).decode()}" for key in keys
        )
    return headers


def verify_webhook(
    secret: str | Sequence[str],
    headers: Mapping[str, str],
    body: bytes | str,
    tolerance_seconds: float = 300,
) -> dict[str, Any]:
    """The decoded body of a webhook, once its signature is checked.

    `secret` is the secret that the sender signs with (`whsec_…`), or several while one rotates; one
    match suffices. `headers` are those of the request, in upper or lower case, and `body` is its
    body, byte by byte as it was received. A webhook may arrive more than once: `webhook-id` tells
    them apart. Source: Standard Webhooks 1.0 (HMAC-SHA-256 over `id.timestamp.body`).

    Raises `WebhookNotVerified` if a header is missing, if no signature matches, if the body is no
    JSON object, or if its time differs from now by more than `tolerance_seconds`, so that one who
    recorded a webhook cannot send it again later; and `InvalidSecret` for a secret that is none.

    >>> from asyncinfer.client import WebhookNotVerified, verify_webhook
    >>> headers = {"webhook-id": "msg_1", "webhook-timestamp": "1", "webhook-signature": "v1,YQ=="}
    >>> try:
    ...     verify_webhook("whsec_bm90IGEgc2VjcmV0LCBhbiBleGFtcGxl", headers, b"{}")
    ... except WebhookNotVerified as error:
    ...     print(error)
    The webhook's time differs from now by more than 300 seconds.
    """
    keys = _signing_keys(secret)
    _check_types(headers, body, tolerance_seconds)
    body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    verify_signature(keys, headers, body, tolerance_seconds, now_seconds=time.time())
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WebhookNotVerified("The webhook's body is not a JSON object.") from error


def _signing_keys(secret: object) -> list[bytes]:
    """The keys of one secret or of several; raises InvalidSecret if there is none, or a wrong one.

    The message has the place of a wrong one, and does not repeat it.
    """
    if isinstance(secret, str | bytes) or not isinstance(secret, Iterable):
        secret = [secret]
    secrets = list(secret)
    if not secrets:
        raise InvalidSecret("verify_webhook takes one secret or several, and got none.")
    keys = []
    for place, each in enumerate(secrets):
        name = "The secret" if len(secrets) == 1 else f"The secret at place {place}"
        if not isinstance(each, str):
            raise InvalidSecret(f"{name} is of the type {type(each).__name__}; it is a string.")
        try:
            keys.append(signing_key(each))
        except ValueError as error:
            raise InvalidSecret(f"{name} of verify_webhook is none: {error}.") from None
    return keys


def _check_types(headers: object, body: object, tolerance_seconds: object) -> None:
    """Raises WebhookNotVerified for an argument of another type than `verify_webhook` takes."""
    for name, value, is_of_type, words in (
        ("headers", headers, hasattr(headers, "items"), "a dict of the request's headers"),
        ("body", body, isinstance(body, bytes | bytearray | str), "the bytes of its body"),
        ("tolerance_seconds", tolerance_seconds, isinstance(tolerance_seconds, Real), "a number"),
    ):
        if not is_of_type:
            raise WebhookNotVerified(
                f"{name} is of the type {type(value).__name__}; verify_webhook takes {words}."
            )


def verify_signature(
    keys: Sequence[bytes],
    headers: Mapping[str, str],
    body: bytes,
    tolerance_seconds: float,
    *,
    now_seconds: float,
) -> None:
    """Checks a webhook's headers and body at the time `now_seconds` since 1970; raises
    WebhookNotVerified as `verify_webhook`."""
    by_name = {str(name).lower(): value for name, value in headers.items()}
    webhook_id = _field(by_name, "webhook-id")
    timestamp = _field(by_name, "webhook-timestamp")
    signatures = _field(by_name, "webhook-signature").split(" ")[:_MAX_SIGNATURES]
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) < 20):
        raise WebhookNotVerified("The header webhook-timestamp is not a number of seconds.")
    if abs(now_seconds - int(timestamp)) > tolerance_seconds:
        raise WebhookNotVerified(
            f"The webhook's time differs from now by more than {tolerance_seconds:g} seconds."
        )
    signed = _signed_content(webhook_id, timestamp, body)
    expected = [_signature(key, signed) for key in keys]
    received = [_decoded(signature) for signature in signatures]
    # Each pair is compared, so that the time does not tell which of the secrets is valid.
    matches = [hmac.compare_digest(one, other) for one in expected for other in received]
    if not any(matches):
        raise WebhookNotVerified(
            "No signature of the webhook matches. Check that the secret is the sender's, and that "
            "the body was not decoded and encoded again."
        )


def _field(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if isinstance(value, str) and value:
        return value
    raise WebhookNotVerified(f"The webhook has no header {name}.")


def _signed_content(webhook_id: str, timestamp: str, body: bytes) -> bytes:
    return b"%s.%s.%s" % (webhook_id.encode("utf-8", "surrogatepass"), timestamp.encode(), body)


def _signature(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, hashlib.sha256)


def _decoded(signature: str) -> bytes:
    """The bytes of a signature of the version that is known here, else none."""
    version, _, encoded = signature.partition(",")
    if version != _VERSION:
        return b""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return b""
