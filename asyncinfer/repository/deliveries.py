"""Deliveries of webhooks as Redis holds them: where they go, their names and their states."""

import re
from functools import cached_property
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from asyncinfer.untrusted import decoding
from asyncinfer.untrusted.decoding import lenient_decoder

Outcome = Literal["delivered", "gone", "given_up"]
"""How a delivery is done. `gone`: the receiver wants no more (410)."""

MAX_ATTEMPTS: Final = 20
"""Attempts of a delivery that are remembered, the newest: nine, and those of redeliveries."""

MAX_BODY_BYTES: Final = 64 << 10
"""Of a kept body. A larger one was written by another program, and is made anew."""

MAX_DONE_BODY_BYTES: Final = 8 << 10
"""Of a body that is kept with a delivery that is done, to be sent again: enough for a job without
its result, with metadata of any size."""

_OWN_BYTES: Final = 2048
"""Reserved for what a body says besides metadata and result, and for the state."""

_MAX_ROUND: Final = (1 << 53) - 1
"""The largest that Lua counts exactly."""

_MEMBER: Final = re.compile(rb"(.+)_(\d{1,16})_([a-z]{1,16})", re.DOTALL)

_encode = msgspec.msgpack.Encoder().encode


class Target(Struct, frozen=True, array_like=True, dict=True):
    """Where the deliveries of a job go, and what is known of it once it is gone."""

    url: str
    tenant: str
    model: str = ""
    metadata: dict[str, Any] = {}

    @cached_property
    def text(self) -> str:
        """Itself as JSON, which is text: Lua unpacks no bytes of msgpack."""
        return msgspec.json.encode(self).decode()

    @property
    def reserved_bytes(self) -> int:
        """What a delivery reserves: target, state, and a body that has no result."""
        return 2 * len(self.text.encode()) + _OWN_BYTES


class Attempt(Struct, frozen=True, array_like=True):
    """One try of a delivery."""

    at_ms: int
    """When it began, in ms since 1970."""
    status: int
    """The HTTP status of the answer; 0 without one."""
    error: str = ""
    """Why there was no answer, in one word; empty with one."""
    duration_ms: int = 0


class DeliveryState(Struct, frozen=True, array_like=True):
    """What became of a delivery so far."""

    attempts: tuple[Attempt, ...] = ()
    """The newest, at most `MAX_ATTEMPTS`."""
    tries: int = 0
    """Attempts since the delivery began, or was started anew."""
    outcome: Outcome | None = None
    """None for a delivery to come."""
    restarted_ms: int = 0
    """When it was started anew, by the clock of the API; 0 for never."""
    ended_ms: int = 0
    """When the round ended that it tells of; 0 if that is not known."""


class Member(Struct, frozen=True):
    """The parts of a delivery's name in the outbox."""

    job_id: str
    round: int
    event: str

    @property
    def field(self) -> str:
        """Its state's field in the hash of the job's webhook."""
        return f"{self.round}_{self.event}"

    @property
    def name(self) -> str:
        return f"{self.job_id}_{self.field}"

    @property
    def webhook_id(self) -> str:
        """The id that its receiver sees, the same in each try (the `webhook-id` of Standard
        Webhooks)."""
        return f"msg_{self.name}"


def parse_member(stored: bytes) -> Member | None:
    """None if it is no name of a delivery."""
    found = _MEMBER.fullmatch(stored)
    job_id = found and decoding.name(found[1])
    return Member(job_id, int(found[2]), found[3].decode()) if found and job_id else None


def delivered_round(number: int) -> int:
    """The number of a round as its delivery has it."""
    return min(number, _MAX_ROUND)


read_target = lenient_decoder(msgspec.json.Decoder(Target).decode)
_read_state = lenient_decoder(msgspec.msgpack.Decoder(DeliveryState).decode)
_NO_STATE: Final = DeliveryState()


def read_state(stored: bytes | None) -> DeliveryState:
    """The state in packed bytes; that of a delivery without a try if they are missing, corrupt, or
    only digits, which say when its round ended."""
    if stored and stored.isdigit():
        return DeliveryState(ended_ms=decoding.whole_number(stored) or 0)
    return (stored and _read_state(stored)) or _NO_STATE


def pack_state(state: DeliveryState) -> bytes:
    return _encode(state)


def after_attempt(state: DeliveryState, attempt: Attempt, outcome: Outcome | None) -> DeliveryState:
    """The state after one more attempt. An attempt that it has already changes nothing. Once one
    was delivered, it stays so, whatever a try that came late says."""
    if attempt in state.attempts:
        return state
    return msgspec.structs.replace(
        state,
        attempts=(*state.attempts, attempt)[-MAX_ATTEMPTS:],
        tries=state.tries + 1,
        outcome=outcome if outcome == "delivered" else state.outcome or outcome,
    )


def restarted(state: DeliveryState, now_ms: int) -> DeliveryState:
    """The state of a delivery whose tries start anew; its attempts are remembered."""
    return msgspec.structs.replace(state, tries=0, outcome=None, restarted_ms=now_ms)
