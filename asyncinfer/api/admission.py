"""As whom a request was let in, and whether it still would be."""

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
    """Whose jobs a request is about."""

    tenant: str | None
    """None: those of all tenants."""
    across: bool
    """Asked by an operator, who is shown no payloads."""


class Admission:
    """Who asks. A key may be revoked while its request is under way: what waits or goes on asks
    `revoked`, or `check` before it changes anything."""

    __slots__ = ("_caller", "_digest", "_keyring", "_keys", "_needed", "own")

    def __init__(
        self, caller: Caller, keys: KeyFile | None = None, digest: str | None = None
    ) -> None:
        self.own = Reach(caller.tenant, across=False)
        self._caller = caller
        self._keys = keys
        self._keyring: Keyring | None = keys.keyring if keys else None
        self._digest = digest
        self._needed: str | None = None

    @property
    def tenant(self) -> str:
        return self._caller.tenant

    @property
    def shown_key(self) -> str | None:
        """What a log may say of the key: where its SHA-256 begins."""
        return self._digest and self._digest[:_SHOWN_DIGITS]

    @property
    def revocable(self) -> bool:
        """Whether it is a key's."""
        return self._digest is not None

    def may(self, scope: str) -> bool:
        return scope in self._caller.scopes

    def need(self, scope: str) -> None:
        """Raises Forbidden where the key lacks the scope."""
        if scope not in self._caller.scopes:
            raise _forbidden(scope)
        if self._keys:
            self._needed = scope

    def check(self) -> None:
        """Raises where the key would not be let in any more."""
        if self._keys and self._keys.keyring is not self._keyring:
            self._look_again(self._keys)

    async def revoked(self) -> RequestError:
        """Returns once the key would not be let in any more, with what is to be said."""
        assert self._keys is not None, "only a key can be revoked"
        assert self._keyring is not None
        while True:
            await self._keys.changed(self._keyring)
            try:
                self._look_again(self._keys)
            except (Unauthorized, Forbidden) as error:
                return error

    def _look_again(self, keys: KeyFile) -> None:
        self._keyring = keys.keyring
        if self._digest is None:
            return
        caller = self._keyring.caller_of(self._digest)
        if caller is None or caller.tenant != self.tenant:
            raise unauthorized("This API key was revoked while the request was under way.")
        if self._needed and self._needed not in caller.scopes:
            raise _forbidden(self._needed)


ANYBODY: Final = Admission(_ANYBODY)
"""Where no keys are in use everyone may do everything, as the tenant that jobs have then."""


def admission(keys: KeyFile, key: str | None) -> Admission:
    """Raises Unauthorized where the key is not known."""
    if key is None:
        raise unauthorized("Send an API key: `Authorization: Bearer KEY`, or `X-API-Key: KEY`.")
    digest = digest_of(key)
    caller = keys.keyring.caller_of(digest)
    if caller is None:
        raise unauthorized("This API key is not known here, or is no longer.")
    return Admission(caller, keys, digest)


def open_admission(keys: KeyFile, key: str | None) -> Admission:
    """For routes that need no key: a key that is not known is treated as none, since a load
    balancer that still has an old one must not take every server for dead."""
    try:
        return admission(keys, key)
    except Unauthorized:
        return Admission(_NOBODY)


def reach(asking: Admission, needed: str | None, asked: str | None) -> Reach:
    """`asked` is the query's `tenant`; raises Forbidden where the key lacks the scope."""
    if asked is None or (asked == asking.tenant and not asking.may("operator")):
        if needed:
            asking.need(needed)
        return asking.own
    asking.need("operator")
    return Reach(None if asked == ALL_TENANTS else asked, across=True)


def unauthorized(detail: str) -> Unauthorized:
    return Unauthorized(detail, headers=[("www-authenticate", "Bearer")])


def _forbidden(scope: str) -> Forbidden:
    return Forbidden(
        f"This needs the scope `{scope}`, which this API key does not have. Ask for a key that "
        f"has it: `asyncinfer keygen --scopes {scope}`."
    )
