"""The W3C headers: what is read from them, what is ignored, and what is bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import TraceState

from asyncinfer.jobs import TraceContext
from asyncinfer.telemetry import trace_context

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (PARENT, PARENT),
        (f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        (f"00-{TRACE}-{SPAN}-ff", f"00-{TRACE}-{SPAN}-03"),  # flags that nobody knows yet
        (f"cc-{TRACE}-{SPAN}-01-what-will-be", PARENT),  # a later version
    ],
)
def test_a_valid_traceparent_is_read(sent: str, kept: str) -> None:
    assert trace_context.read(sent) == TraceContext(kept)


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "00",
        PARENT.upper(),
        f" {PARENT}",
        f"{PARENT}\n",
        f"{PARENT}-more",
        f"{PARENT}, {PARENT}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.what",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 300}",
        "\xff" * 55,
    ],
)
def test_a_malformed_traceparent_is_ignored(sent: str) -> None:
    assert trace_context.read(sent, "a=1") is None


@pytest.mark.parametrize("state", ["a=1", "a=1, b@c=2 3\t,,", "0/x@y=~!", "a=" + "x" * 200])
def test_a_valid_tracestate_is_kept_as_it_is(state: str) -> None:
    assert trace_context.read(PARENT, state) == TraceContext(PARENT, state)


@pytest.mark.parametrize(
    "state",
    [
        "a",
        "A=1",
        "a=1=2",
        "a=\xe9",
        "a=1\nb=2",
        "a=" + "x" * 300,
        ",".join(f"k{number}={'v' * 20}" for number in range(30)),  # over 512 characters
        ",".join("a=1" for _ in range(33)),
    ],
)
def test_a_malformed_or_long_tracestate_is_dropped_whole(state: str) -> None:
    assert trace_context.read(PARENT, state) == TraceContext(PARENT)


@given(st.text(max_size=600), st.text(max_size=600))
def test_what_is_kept_of_any_text_is_short_and_valid(parent: str, state: str) -> None:
    for context in (trace_context.read(parent, state), trace_context.read(PARENT, state)):
        if context:
            assert len(context.traceparent) + len(context.tracestate) <= 55 + 512
            assert trace_context.read(context.traceparent, context.tracestate) == context
            assert context.tracestate.isascii()


MEMBERS = st.from_regex(r"[ \t]?[a-z0-9@]{1,4}=[ -~]{1,3}[ \t]?", fullmatch=True)


@given(st.lists(MEMBERS, max_size=3))
def test_opentelemetry_reads_every_tracestate_that_is_kept(members: list[str]) -> None:
    names = {member.partition("=")[0].strip() for member in members}
    context = trace_context.read(PARENT, ",".join(members))
    assert context
    if context.tracestate and len(names) == len(members) == context.tracestate.count("="):
        assert set(TraceState.from_header([context.tracestate])) == names


def test_only_a_sampled_trace_is_kept_of_a_request() -> None:
    assert trace_context.sampled_context({b"traceparent": PARENT.encode()}) == TraceContext(PARENT)
    unsampled = f"{PARENT[:-1]}0".encode()
    assert trace_context.sampled_context({b"traceparent": unsampled}) is None
    assert trace_context.sampled_context({b"tracestate": b"a=1"}) is None
