"""The job record, job ids, and the decision between a retry and a dead letter."""

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer import jobs
from asyncinfer.jobs import SCHEMA, Options, Record
from asyncinfer.untrusted.decoding import MAX_TIME_MS

RECORD = Record(SCHEMA, "q", "iris", "default", 1)


# --- the job record ------------------------------------------------------------------------


def test_a_record_survives_redis_with_its_sequence_number() -> None:
    record = Record(SCHEMA, "q", "iris", "me", 5, options=Options(priority="low", ttl_seconds=3))
    meta = b"\0\0\0\0\0\0\0\x07" + jobs.encode_record(record)
    assert jobs.decode_record(meta) == record
    assert jobs.encode_record(record, jobs.record_seq(meta)) == meta


def test_a_record_of_a_later_release_still_reads() -> None:
    later = msgspec.msgpack.encode([*msgspec.to_builtins(RECORD), "a field to come"])
    assert jobs.decode_record(bytes(8) + later) == RECORD


def test_a_record_of_an_earlier_release_still_reads() -> None:
    earlier = msgspec.msgpack.encode([1, "q", "iris", "default", 1])
    assert jobs.decode_record(bytes(8) + earlier) == RECORD


@pytest.mark.parametrize("state", ["", "vendor=1"])
def test_a_record_keeps_its_trace(state: str) -> None:
    trace = jobs.TraceContext(f"00-{'a' * 32}-{'b' * 16}-01", state)
    record = msgspec.structs.replace(RECORD, trace=trace)
    assert jobs.decode_record(jobs.encode_record(record, bytes(8))) == record


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_a_record_or_a_decode_error(meta: bytes) -> None:
    try:
        record = jobs.decode_record(meta)
    except msgspec.DecodeError:
        return
    assert isinstance(record, Record)


@pytest.mark.parametrize(
    "damaged", [b"", b"\x91", b"\x95\x01\xa2\xff\xfe\xa1m\xa1t\x01", b"\x91" * 100_000]
)
def test_a_damaged_record_is_a_decode_error(damaged: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        jobs.decode_record(bytes(8) + damaged)


def test_an_ordinary_job_has_no_facts() -> None:
    assert jobs.decode_facts(None) == jobs.decode_facts(b"") == jobs.Facts()


def test_facts_are_stored_under_the_letters_that_every_release_reads() -> None:
    words = {
        **{"deliveries": 1, "suspect": 2, "cancel_requested": 3, "expired": 4, "start_by_ms": 5},
        **{"finish_by_ms": 6, "priority": "low", "ttl_seconds": 7, "inboxes": ("i",)},
        **{"claimed_before": 8, "idempotency_digest": "d", "webhook_events": 9},
        **{"webhook_round": 10, "lost_deliveries": ("l",)},
    }
    letters = {"d": 1, "s": 2, "c": 3, "e": 4, "b": 5, "l": 6, "p": "low", "t": 7, "r": 8, "k": "d"}
    lists = {"w": ["i"], "x": ["l"]}
    facts = jobs.decode_facts(msgspec.msgpack.encode(letters | lists | {"h": 9, "n": 10}))
    assert msgspec.structs.asdict(facts) == words


@pytest.mark.parametrize(
    "options",
    [
        *('{"priority":"urgent"}', '{"delay_seconds":-1}', '{"delay_seconds":1e9}'),
        *('{"start_within_seconds":0}', '{"finish_within_seconds":0}', '{"ttl_seconds":0}'),
        *('{"ttl_seconds":1.5}', '{"priority":null}'),
    ],
)
def test_options_out_of_bounds_are_refused(options: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(options, type=Options)


def test_an_option_of_a_later_release_is_ignored_in_a_record() -> None:
    assert msgspec.json.decode('{"ttl":5}', type=Options) == Options()


# --- ids -----------------------------------------------------------------------------------


def test_an_id_is_a_uuid_of_version_7_that_contains_its_creation_time() -> None:
    now_ms = time.time_ns() // 1_000_000
    job_id = jobs.new_id(now_ms)
    assert (len(job_id), job_id[12], job_id[16] in "89ab") == (32, "7", True)
    assert jobs.created_ms(job_id) == now_ms
    assert jobs.is_id(job_id)


def test_ids_differ_and_sort_by_time() -> None:
    ids = [jobs.new_id(ms) for ms in range(1000)]
    assert ids == sorted(ids)
    assert len({jobs.new_id(0) for _ in range(1000)}) == 1000


@given(st.integers(0, MAX_TIME_MS))
def test_every_time_up_to_year_9999_makes_an_id_of_our_own_kind(now_ms: int) -> None:
    assert jobs.created_ms(jobs.new_id(now_ms)) == now_ms


@given(st.integers(MAX_TIME_MS + 1, 2**48 - 1))
def test_an_id_of_a_year_beyond_9999_has_no_creation_time(now_ms: int) -> None:
    assert jobs.created_ms(jobs.new_id(now_ms)) is None


@pytest.mark.parametrize(
    "job_id",
    [*("", "x", "1" * 32, "0" * 31 + "g"), pytest.param(jobs.new_id(1).upper(), id="capitals")],
)
def test_an_external_id_has_no_creation_time(job_id: str) -> None:
    assert jobs.created_ms(job_id) is None


@pytest.mark.parametrize("job_id", ["1", "a b", "ü" * 64, "x" * 128, "{}", "a:b", "\udcff"])
def test_an_external_producer_may_choose_nearly_any_id(job_id: str) -> None:
    assert jobs.is_id(job_id)


@pytest.mark.parametrize("job_id", ["", "x" * 129, "ü" * 65, "a\nb", "\0", "\x7f", "\x1b[0m"])
def test_ids_too_long_or_with_control_characters_are_not_accepted(job_id: str) -> None:
    assert not jobs.is_id(job_id)


# --- retry or dead letter ------------------------------------------------------------------


def test_a_job_is_retried_until_its_last_error() -> None:
    assert [jobs.retry_or_dead(errors, 3) for errors in (1, 2, 3, 4)] == [
        *("retry", "retry", "dead", "dead"),
    ]


def test_back_off_doubles_and_is_capped() -> None:
    ceilings = [jobs.backoff_ms(errors, uniform=0.999999) for errors in range(1, 9)]
    assert ceilings == [1999, 3999, 7999, 15999, 31999, 59999, 59999, 59999]
    assert jobs.backoff_ms(3, uniform=0) == 0


@given(st.integers(0, 2000))
def test_back_off_stays_within_its_bounds_however_many_errors(errors: int) -> None:
    assert 0 <= jobs.backoff_ms(errors) <= 60_000
