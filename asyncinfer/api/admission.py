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
    """The caller of a request. Its key may be revoked while the request is being handled: whoever
    waits or streams watches `revoked`, or calls `check` before it changes anything."""

    __slots__ = ("_caller", "_digest", "_keyring", "_keys", "_required_scope", "own")

    def __init__(
        self, caller: Caller, keys: KeyFile | None = None, digest: str | None = None
    ) -> None:
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
        return scope in self._caller.scopes

    def require(self, scope: str) -> None:
        """Raises Forbidden if the key lacks the scope. The scope is remembered: `check` and
        `revoked` also fail once the key has lost it."""
        if scope not in self._caller.scopes:
            raise _forbidden(scope)
        if self._keys:
            self._required_scope = scope

    def check(self) -> None:
        """Raises Unauthorized or Forbidden if the key would not be admitted any more."""
        if self._keys and self._keys.keyring is not self._keyring:
            self._check_keyring(self._keys)

    async def revoked(self) -> RequestError:
        """Waits until the key would not be admitted any more, and returns the error for the
        client."""
        assert self._keys is not None, "only a key can be revoked"
        assert self._keyring is not None
        while True:
            await self._keys.changed(self._keyring)
            try:
                self._check_keyring(self._keys)
            except (Unauthorized, Forbidden) as error:
                return error

    def _check_keyring(self, keys: KeyFile) -> None:
        """Looks the key up in the current keyring; raises if it is gone, or has lost the scope."""
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
    """The caller with this key; raises Unauthorized if the key is missing or not known."""
    if key is None:
        raise unauthorized("Send an API key: `Authorization: Bearer KEY`, or `X-API-Key: KEY`.")
    digest = digest_of(key)
    caller = keys.keyring.caller_of(digest)
    if caller is None:
        raise unauthorized("This API key is not known here, or was revoked.")
    return Admission(caller, keys, digest)


def admit_without_key(keys: KeyFile, key: str | None) -> Admission:
    """The caller for routes that need no key. An unknown key counts as none, since a load balancer
    that still has an old key must not take every server for dead."""
    try:
        return admit(keys, key)
    except Unauthorized:
        return Admission(_NOBODY)


def reach_of(admission: Admission, scope: str | None, tenant: str | None) -> Reach:
    """The jobs that a request is about. `scope` is what its route needs, `tenant` is the query's;
    raises Forbidden if the key lacks the scope, or `operator` for another tenant."""
    if tenant is None or (tenant == admission.tenant and not admission.has_scope("operator")):
        if scope:
            admission.require(scope)
        return admission.own
    admission.require("operator")
    return Reach(None if tenant == ALL_TENANTS else tenant, across=True)


def unauthorized(detail: str) -> Unauthorized:
    """A 401 with the challenge that HTTP requires."""
    return Unauthorized(detail, headers=[("www-authenticate", "Bearer")])


def _forbidden(scope: str) -> Forbidden:
    return Forbidden(
        f"This needs the scope `{scope}`, which this API key does not have. Ask for a key that "
        f"has it: `asyncinfer keygen --scopes {scope}`."
    )
