"""The caller of a request, and whether its API key is still valid."""

from typing import Final

from msgspec import Struct

from asyncinfer.api.key_file import KeyFile
from asyncinfer.api_keys import SCOPES, Caller, Keyring, digest_of
from asyncinfer.errors import Forbidden, RequestError, Unauthorized
from asyncinfer.jobs import DEFAULT_TENANT
from asyncinfer.schemas.requests import ALL_TENANTS

_SHOWN_DIGITS: Final = 8
_ANYBODY: Final = Caller(DEFAULT_TENANT, frozenset(SCOPES))
_NOBODY: Final = Caller(DEFAULT_TENANT, frozenset())


class Reach(Struct, frozen=True):
    """The tenant or tenants whose jobs a request is about."""

    tenant: str | None
    """None means all tenants."""
    across: bool
    """Whether an operator requests jobs across tenants, and is shown no payloads."""


class Admission:
    """The caller of one request. Its key may be revoked while the request is being handled: whoever
    waits or streams watches `revoked`, or calls `check` before it changes anything."""

    __slots__ = ("_caller", "_digest", "_keyring", "_keys", "_required_scope", "own")

    def __init__(
        self, caller: Caller, keys: KeyFile | None = None, digest: str | None = None
    ) -> None:
        """`digest` is the SHA-256 of the caller's key in hex digits, None for a caller without a
        key. `keys` has the keys in use, None for a caller that no later change of the key file
        concerns."""
        self.own = Reach(caller.tenant, across=False)
        self._caller = caller
        self._keys = keys
        self._keyring: Keyring | None = keys.keyring if keys else None
        self._digest = digest
        self._required_scope: str | None = None

    @property
    def tenant(self) -> str:
        return self._caller.tenant

    @property
    def shown_key(self) -> str | None:
        """What a log may show of the key: the first digits of its SHA-256; None without a key."""
        return self._digest and self._digest[:_SHOWN_DIGITS]

    @property
    def revocable(self) -> bool:
        """Whether the caller was admitted by a key, which may be revoked."""
        return self._digest is not None

    def has_scope(self, scope: str) -> bool:
        """Whether the caller had the scope when the request was admitted."""
        return scope in self._caller.scopes

    def require(self, scope: str) -> None:
        """Raises Forbidden if the caller did not have the scope when the request was admitted. The
        scope is remembered, the last one only: `check` and `revoked` also fail once the key has
        lost it."""
        if scope not in self._caller.scopes:
            raise _forbidden(scope)
        if self._keys:
            self._required_scope = scope

    def check(self) -> None:
        """Raises Unauthorized if the key is gone or has another tenant, and Forbidden if it has
        lost the required scope. Reads no file, and does nothing for a caller without a key."""
        if self._keys and self._keys.keyring is not self._keyring:
            self._check_keyring(self._keys)

    async def revoked(self) -> RequestError:
        """Waits until the key would not be admitted any more, and returns the Unauthorized or
        Forbidden for the client, which is not raised. Call it only if `revocable`."""
        assert self._keys is not None, "only a key can be revoked"
        assert self._keyring is not None
        while True:
            await self._keys.changed(self._keyring)
            try:
                self._check_keyring(self._keys)
            except (Unauthorized, Forbidden) as error:
                return error

    def _check_keyring(self, keys: KeyFile) -> None:
        """Looks the key up in the current keyring, which counts as checked from then on, also if
        this raises. Raises Unauthorized if the key is gone or has another tenant, Forbidden if it
        has lost the required scope."""
        self._keyring = keys.keyring
        if self._digest is None:
            return
        caller = self._keyring.caller_of(self._digest)
        if caller is None or caller.tenant != self.tenant:
            raise unauthorized("This API key was revoked while the request was being handled.")
        if self._required_scope and self._required_scope not in caller.scopes:
            raise _forbidden(self._required_scope)


ANYBODY: Final = Admission(_ANYBODY)
"""Without a key file everyone may do everything, as the default tenant."""


def admit(keys: KeyFile, key: str | None) -> Admission:
    """Returns the caller with this key, the text that the client sent. Raises Unauthorized if the
    key is missing (None) or not known."""
    if key is None:
        raise unauthorized("Send an API key: `Authorization: Bearer KEY`, or `X-API-Key: KEY`.")
    digest = digest_of(key)
    caller = keys.keyring.caller_of(digest)
    if caller is None:
        raise unauthorized("This API key is not known here, or was revoked.")
    return Admission(caller, keys, digest)


def admit_without_key(keys: KeyFile, key: str | None) -> Admission:
    """Returns the caller for routes that need no key; raises nothing. An unknown key counts as
    none, which has no scopes, since a load balancer that still has an old key must not take every
    server for dead."""
    try:
        return admit(keys, key)
    except Unauthorized:
        return Admission(_NOBODY)


def reach_of(admission: Admission, scope: str | None, tenant: str | None) -> Reach:
    """Returns whose jobs a request is about. `scope` is what its route needs, None for nothing;
    `tenant` is the query's, None for the caller's own. Raises Forbidden if the key lacks the scope,
    or `operator` for another tenant. An operator who names its own tenant also acts across
    tenants."""
    if tenant is None or (tenant == admission.tenant and not admission.has_scope("operator")):
        if scope:
            admission.require(scope)
        return admission.own
    admission.require("operator")
    return Reach(None if tenant == ALL_TENANTS else tenant, across=True)


def unauthorized(detail: str) -> Unauthorized:
    """Makes a 401 with the challenge that HTTP requires."""
    return Unauthorized(detail, headers=[("www-authenticate", "Bearer")])


def _forbidden(scope: str) -> Forbidden:
    """Makes the 403 for a caller that lacks the scope."""
    return Forbidden(
        f"This needs the scope `{scope}`, which this API key does not have. Ask for a key that "
        f"has it: `asyncinfer keygen --scopes {scope}`."
    )
