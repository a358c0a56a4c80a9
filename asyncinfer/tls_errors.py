"""Why a connection with TLS failed, in words, for connections to Redis and for the HTTP client."""

import ssl
from collections.abc import Iterator
from enum import Enum
from typing import Final

from msgspec import Struct

_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
_OTHER_NAME: Final = frozenset({62, 64})
"""A host name, or an IP address, that is not in the certificate. These are X509_V_ERR_ codes."""

_NO_TLS_REASONS: Final = (
    *("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"),
    "RECORD_LAYER_FAILURE",
)
"""What OpenSSL says of the first bytes of a server without TLS, by its release."""

_CERTIFICATE_WANTED: Final = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "UNKNOWN_CA")


class TlsProblem(Enum):
    UNTRUSTED = "its certificate is not trusted"
    EXPIRED = "its certificate has expired"
    NOT_YET_VALID = "its certificate is not valid yet"
    OTHER_NAME = "its certificate is for another host name"
    NO_TLS = "this port speaks no TLS"
    CERTIFICATE_WANTED = "it does not accept the client certificate, or wants one"
    OTHER = "TLS failed"


class TlsFault(Struct, frozen=True):
    problem: TlsProblem
    detail: str
    """What OpenSSL says of it; may be empty."""

    def __str__(self) -> str:
        return f"{self.problem.value} ({self.detail})" if self.detail else self.problem.value


def tls_fault(error: BaseException) -> TlsFault | None:
    """What TLS says of a failed connection; None if it failed for another reason."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _of_certificate(cause)
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return _of_handshake(cause)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _of_certificate(error: ssl.SSLCertVerificationError) -> TlsFault:
    detail = error.verify_message.rstrip(".")
    if error.verify_code == _EXPIRED:
        return TlsFault(TlsProblem.EXPIRED, "")
    if error.verify_code == _NOT_YET_VALID:
        return TlsFault(TlsProblem.NOT_YET_VALID, "")
    if error.verify_code in _OTHER_NAME:
        return TlsFault(TlsProblem.OTHER_NAME, detail)
    return TlsFault(TlsProblem.UNTRUSTED, detail)


def _of_handshake(error: ssl.SSLError) -> TlsFault:
    reason = error.reason or ""
    if reason in _NO_TLS_REASONS:
        return TlsFault(TlsProblem.NO_TLS, "")
    if reason.endswith(_CERTIFICATE_WANTED):
        return TlsFault(TlsProblem.CERTIFICATE_WANTED, reason.lower().replace("_", " "))
    return TlsFault(TlsProblem.OTHER, reason.lower().replace("_", " "))
