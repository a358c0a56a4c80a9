"""The faults, each one line that a person could write, and tests that are known to notice it."""

from typing import Final

from msgspec import Struct

from tests.process import REPOSITORY


class Fault(Struct, frozen=True):
    """One wrong line. The name says what is wrong then."""

    name: str
    file: str
    """The file, from the root of the repository."""
    old: str
    """Text within one line, which is in the file once."""
    new: str
    tests: tuple[str, ...]
    """Tests that notice the fault, the fastest first."""
    only_soak: bool = False
    """Whether only soak tests notice it."""


def problem_of(fault: Fault) -> str | None:
    """Why a fault cannot be planted in this checkout; None if it can."""
    path = REPOSITORY / fault.file
    count = path.read_text().count(fault.old) if path.is_file() else 0
    if count == 1:
        return None
    return (
        f"{fault.name}: {fault.file} has its line {count} times, not once; "
        "the code has changed: adapt this fault."
    )


_LUA: Final = "asyncinfer/repository/lua"
_WEBHOOKS: Final = "asyncinfer/webhooks"

FAULTS: Final = (
    # --- scripts
    Fault(
        "a_position_counts_jobs_that_were_cancelled",
        f"{_LUA}/look.lua",
        "if is_stale[i] ~= 1 then front[#front + 1] = ids[i] end",
        "front[#front + 1] = ids[i]",
        ("tests/api/test_positions.py::test_stale_entries_and_jobs_out_of_order_do_not_count",),
    ),
    Fault(
        "each_reader_of_a_job_takes_a_look",
        "asyncinfer/api/queue_looks.py",
        "_LOOK_SECONDS: Final = 1.0",
        "_LOOK_SECONDS: Final = 0.0",
        (
            "tests/api/test_positions.py::test_however_many_poll_a_queue_it_is_looked_at_once_a_second",
        ),
    ),
    Fault(
        "a_worker_is_lost_only_when_its_lease_has_ended",
        "asyncinfer/repository/inspect/queue_look.py",
        '"overdue_ms": policy.lease_ms // 2,',
        '"overdue_ms": 0,',
        ("tests/api/test_positions.py::test_a_job_whose_worker_is_lost_says_when_it_runs_again",),
    ),
    Fault(
        "a_redelivered_job_shares_its_claim",
        f"{_LUA}/_claim.lua",
        "if facts[DELIVERIES] or facts[SUSPECT] then return 'exclusive' end",
        "if facts[SUSPECT] then return 'exclusive' end",
        ("tests/repository/test_claims.py::test_a_redelivered_job_is_claimed_alone",),
    ),
    Fault(
        "a_finish_by_a_worker_that_lost_its_lease_counts",
        f"{_LUA}/finish.lua",
        "if tokens[i] ~= args.token or seen[id] then",
        "if not tokens[i] or seen[id] then",
        (
            "tests/repository/test_claims.py::test_a_finish_without_a_lease_is_stale_and_changes_nothing",
        ),
    ),
    Fault(
        "an_end_that_its_webhook_does_not_want_is_told",
        f"{_LUA}/_webhook_ending.lua",
        "if ended.facts[WEBHOOK_EVENTS] % (2 * bit) >= bit then",
        "if ended.facts[WEBHOOK_EVENTS] >= bit then",
        (
            "tests/repository/test_outbox.py::test_an_end_that_the_webhook_does_not_want_is_not_told_and_leaves_nothing",
        ),
    ),
    Fault(
        "a_delivered_webhook_keeps_its_room",
        f"{_LUA}/note.lua",
        "  release_webhook(q, delivery.round)",
        "  if outcome == 'given_up' then release_webhook(q, delivery.round) end",
        (
            "tests/repository/test_outbox.py::test_a_submit_with_a_webhook_is_refused_where_there_is_no_room_for_it",
        ),
    ),
    Fault(
        "a_late_sender_takes_the_lease_of_the_next",
        f"{_LUA}/note.lua",
        "  elseif score and score == tonumber(lease) then",
        "  elseif score then",
        (
            "tests/repository/test_outbox.py::test_a_slow_sender_adds_its_attempt_and_takes_no_lease_from_the_next",
        ),
    ),
    Fault(
        "a_webhook_that_was_given_up_loses_its_body",
        f"{_LUA}/note.lua",
        "if outcome ~= 'given_up' and delivery.field:match('_completed$') then return true end",
        "if delivery.field:match('_completed$') then return true end",
        (
            "tests/webhooks/test_bodies.py::test_what_was_given_up_is_sent_again_with_its_result_though_its_job_is_gone",
        ),
    ),
    Fault(
        "a_tenant_takes_all_places_of_closed_groups",
        f"{_LUA}/close_group.lua",
        "if followed_of(q, args.tenant) >= free then return 'tenant_full' end",
        "",
        (
            "tests/repository/test_closed_groups.py::test_a_tenant_leaves_others_as_many_groups_as_it_has",
        ),
    ),
    Fault(
        "a_closed_group_takes_jobs",
        f"{_LUA}/submit.lua",
        "is_closed(closed_groups, options.group) then return 'closed' end",
        "is_closed(closed_groups, options.group) then return 'ok' end",
        (
            "tests/repository/test_closed_groups.py::test_a_closed_group_takes_no_more_jobs_and_others_do",
        ),
    ),
    Fault(
        "an_ended_job_of_a_closed_group_is_counted_again",
        f"{_LUA}/count_ended.lua",
        "redis.call('HSET', closed, 'cursor', cursor,",
        "redis.call('HSET', closed, 'cursor', cursor - count,",
        (
            "tests/repository/test_closed_groups.py::test_jobs_count_as_they_were_when_they_had_ended",
        ),
    ),
    Fault(
        "a_closed_group_ends_again_and_again",
        f"{_LUA}/end_group.lua",
        "unfollow_group(q, args.digest)",
        "",
        (
            "tests/repository/test_closed_groups.py::test_a_group_ends_once_however_many_processes_follow_it",
        ),
    ),
    Fault(
        "the_room_of_a_groups_webhook_is_given_back_before_its_end",
        f"{_LUA}/settle.lua",
        "if not id or not (is_expected(id, number) or is_followed(id) or is_open(id, number)) then",
        "if not id or not (is_expected(id, number) or is_open(id, number)) then",
        (
            "tests/repository/test_closed_groups.py::test_the_room_of_a_groups_webhook_is_reserved_by_its_close",
        ),
    ),
    Fault(
        "an_idempotency_key_has_no_ttl",
        f"{_LUA}/submit.lua",
        "redis.call('SET', q['idem:' .. key], by_key[key], 'EX', args.idempotency_ttl_seconds)",
        "redis.call('SET', q['idem:' .. key], by_key[key])",
        (
            "tests/repository/test_submissions.py::test_keys_are_kept_as_long_as_jobs_and_a_day_at_least",
        ),
    ),
    Fault(
        "an_idempotency_key_outlives_its_job",
        f"{_LUA}/_ending.lua",
        "if #owners > 0 then expire_idempotency_keys(q, owners) end",
        "",
        ("tests/repository/test_idempotency_keys.py::test_a_key_is_kept_as_long_as_its_ended_job",),
    ),
    Fault(
        "a_job_shortens_the_idempotency_key_of_a_later_one",
        f"{_LUA}/_idempotency.lua",
        "if not value or value:sub(1, #prefix) ~= prefix then names[i] = false end",
        "if not value then names[i] = false end",
        (
            "tests/repository/test_idempotency_keys.py::"
            "test_the_end_of_a_job_leaves_a_key_alone_that_a_later_job_has",
        ),
    ),
    Fault(
        "a_lost_job_is_delivered_once_too_often",
        f"{_LUA}/reap.lua",
        "elseif facts[DELIVERIES] >= args.max_deliveries then",
        "elseif facts[DELIVERIES] > args.max_deliveries then",
        (
            "tests/repository/test_maintenance.py::test_a_job_that_loses_its_worker_too_often_is_a_dead_letter",
        ),
    ),
    Fault(
        "a_lost_worker_is_not_noted",
        f"{_LUA}/reap.lua",
        "lost[#lost + 1] = now .. ' ' ..",
        "lost[#lost + 1] = 'lost ' ..",
        (
            "tests/api/test_timeline.py::test_a_dead_letter_shows_each_delivery_and_a_retry_begins_anew",
        ),
    ),
    Fault(
        "after_an_outage_jobs_are_taken_from_live_workers",
        f"{_LUA}/reap.lua",
        "if not last or last > now or now - last > args.lease_ms / 2 then",
        "if not last or last > now then",
        (
            "tests/repository/test_maintenance.py::test_after_a_gap_no_worker_loses_jobs_for_one_lease",
        ),
    ),
    Fault(
        "a_renewal_takes_ms_for_seconds",
        f"{_LUA}/renew.lua",
        "now + args.lease_ms + n / 1000",
        "now + args.lease_ms / 1000 + n / 1000",
        ("tests/repository/test_claims.py::test_renewing_extends_the_lease",),
    ),
    Fault(
        "a_running_job_is_cancelled_without_notice_to_its_worker",
        f"{_LUA}/cancel.lua",
        "notify_workers(q, 'cancel', id)",
        "",
        (
            "tests/repository/test_submissions.py::test_cancelling_a_running_job_notifies_its_worker",
        ),
    ),
    Fault(
        "the_input_of_a_retried_job_expires",
        f"{_LUA}/retry.lua",
        "redis.call('PERSIST', job_key(id, 'data'))",
        "",
        ("tests/repository/test_submissions.py::test_a_retry_opens_a_new_round",),
    ),
    Fault(
        "a_claim_takes_one_job_more_than_fits",
        f"{_LUA}/_claim.lua",
        "taken > 0 and chosen.bytes + bytes > args.max_bytes",
        "taken > 0 and chosen.bytes > args.max_bytes",
        (
            "tests/repository/test_claims.py::test_a_claim_is_bounded_in_bytes_but_takes_one_at_least",
        ),
    ),
    Fault(
        "a_library_that_the_server_lost_is_not_loaded_again",
        "asyncinfer/repository/functions.py",
        'return str(error) == "Function not found"',
        "return False",
        (
            "tests/repository/test_functions.py::test_the_first_call_loads_the_library_and_no_later_one_does",
        ),
    ),
    Fault(
        "the_library_of_a_living_process_is_deleted",
        "asyncinfer/repository/libraries.py",
        "return rounds + 1 if before == value else 0",
        "return rounds + 1",
        ("tests/repository/test_libraries.py::test_the_library_of_a_living_process_is_kept",),
    ),
    # --- leases and redelivery
    Fault(
        "a_lease_is_never_renewed",
        "asyncinfer/worker/lease_renewer.py",
        "self._tokens[claim.token] = claim.queue",
        "self._tokens.get(claim.token)",
        ("tests/repository/test_reaper.py::test_a_stalled_loop_loses_no_lease",),
    ),
    # --- batches and their results
    Fault(
        "the_second_half_of_a_batch_that_fails_gets_the_inputs_of_the_first",
        "asyncinfer/worker/execution.py",
        "self.jobs[part], self.inputs[part], self.rows[part])",
        "self.jobs[part], self.inputs[: len(self.jobs[part])], self.rows[part])",
        (
            "tests/faults/test_time_outs.py::test_a_job_whose_input_the_model_refuses_fails_alone_in_its_batch",
        ),
    ),
    Fault(
        "each_job_gets_the_results_of_a_row_beside_its_own",
        "asyncinfer/models/batching.py",
        "(slice(start, end),)",
        "(slice(start + 1, end + 1),)",
        ("tests/models/test_batching.py::test_what_was_stacked_is_split_into_the_same_pieces",),
    ),
    Fault(
        "jobs_with_other_values_of_a_shared_input_share_a_run",
        "asyncinfer/models/batching.py",
        "key.append((name, array.dtype, shape, _content(array)))",
        "key.append((name, array.dtype, shape))",
        (
            "tests/models/test_batching.py::test_an_input_that_is_not_stacked_must_be_equal_to_the_last_byte",
        ),
    ),
    Fault(
        "the_second_batch_of_a_claim_gets_the_inputs_of_the_first",
        "asyncinfer/worker/execution.py",
        "tuple(group.inputs[start:end]),",
        "tuple(group.inputs[: end - start]),",
        ("tests/engine/test_batch_probe.py::test_batches_are_bounded_as_model_toml_says",),
    ),
    Fault(
        "jobs_that_want_other_outputs_share_a_run",
        "asyncinfer/worker/execution.py",
        'return (key, (record.answer, record.outputs) if record else ("json", ()))',
        "return key",
        (
            "tests/engine/test_batch_probe.py::test_the_wanted_outputs_decide_which_jobs_share_a_run",
        ),
    ),
    # --- models
    Fault(
        "the_probe_of_batching_compares_an_output_with_itself",
        "asyncinfer/engine/batch_probe.py",
        "if not is_close(expected_output, output):",
        "if not is_close(output, output):",
        ("tests/engine/test_batch_probe.py::test_only_what_is_proved_shares_a_run",),
    ),
    Fault(
        "the_probe_of_batching_takes_a_tenth_for_rounding",
        "asyncinfer/engine/batch_probe.py",
        '"float32": 1e-4',
        '"float32": 1e-1',
        ("tests/engine/test_batch_probe.py::test_only_what_is_proved_shares_a_run",),
    ),
    Fault(
        "a_label_is_that_of_the_class_before",
        "asyncinfer/models/results.py",
        "None if column is None else labels[column]",
        "None if column is None else labels[column - 1]",
        ("tests/models/test_results.py::test_one_row_of_a_labelled_classifier_is_an_object",),
    ),
    Fault(
        "sizes_of_one_symbol_may_differ",
        "asyncinfer/tensors/datatypes.py",
        "elif dim is not None and symbols.setdefault(dim, size) != size:",
        "elif dim is not None and symbols.setdefault(dim, size) < 0:",
        ("tests/tensors/test_datatypes.py::test_whether_a_shape_fits_the_declared_one",),
    ),
    # --- the guard
    Fault(
        "every_ip_address_is_a_host_of_a_local_server",
        "asyncinfer/api/guard.py",
        "if self._any_address and _is_address(name):",
        "if self._any_address or _is_address(name):",
        ("tests/api/test_guard.py::test_a_name_made_to_point_here_is_refused",),
    ),
    Fault(
        "a_script_of_another_page_may_post",
        "asyncinfer/api/guard.py",
        'if scope["method"] not in _SAFE_METHODS and b"origin" in headers:',
        'if scope["method"] in _SAFE_METHODS and b"origin" in headers:',
        ("tests/api/test_guard.py::test_a_script_of_another_page_changes_nothing",),
    ),
    Fault(
        "every_key_reads_the_jobs_of_all_tenants",
        "asyncinfer/api/job_lookup.py",
        "if stored is None or not is_in_reach(request, stored):",
        "if stored is None:",
        ("tests/api/test_guard.py::test_a_job_of_another_tenant_is_not_found",),
    ),
    Fault(
        "a_stream_that_is_continued_shows_changes_of_all_tenants",
        "asyncinfer/api/live/shared_reads.py",
        "if owner is None or owner[0] != topic.tenant:",
        "if owner is None:",
        (
            "tests/faults/test_event_feed.py::test_a_follower_that_reads_the_log_gets_changes_of_its_own_tenant_only",
        ),
    ),
    # --- bounds
    Fault(
        "a_chunked_body_may_have_any_length",
        "asyncinfer/api/http/body.py",
        "if len(content) > limit.max_bytes:",
        "if len(chunk) > limit.max_bytes:",
        ("tests/api/test_bad_input.py::test_a_chunked_body_is_counted_while_it_is_read",),
    ),
    Fault(
        "a_line_that_never_ends_is_held_in_memory",
        "asyncinfer/api/http/ndjson.py",
        "self._partial.clear()",
        "self._partial.append(piece)",
        ("tests/api/test_bulk.py::test_a_line_that_never_ends_is_not_kept",),
    ),
    Fault(
        "a_thousand_refused_lines_end_any_request",
        "asyncinfer/api/bulk/reader.py",
        "max(_MAX_REFUSED, _MAX_REFUSED_PER_ACCEPTED * accepted)",
        "min(_MAX_REFUSED, _MAX_REFUSED_PER_ACCEPTED * accepted)",
        ("tests/api/test_bulk.py::test_some_refused_lines_among_many_end_nothing",),
    ),
    Fault(
        "the_inbox_of_a_dead_api_stays_for_a_day",
        "asyncinfer/api/live/inbox.py",
        "_TTL_SECONDS: Final = 60",
        "_TTL_SECONDS: Final = 60_000",
        ("tests/faults/test_waiting.py::test_an_api_that_dies_leaves_no_key_without_a_ttl",),
    ),
    # --- the API
    Fault(
        "a_key_may_be_used_with_another_request",
        "asyncinfer/api/inputs/new_job.py",
        'if submitted.verdict == "dup" and submitted.fingerprint != job.fingerprint:',
        'if submitted.verdict == "dup" and submitted.fingerprint == "":',
        ("tests/api/test_predict.py::test_the_same_key_with_another_request_is_a_conflict",),
    ),
    Fault(
        "a_stream_that_is_continued_begins_again",
        "asyncinfer/api/handlers/events.py",
        "is_begun = position is not None",
        "is_begun = False",
        (
            "tests/api/test_events.py::test_a_stream_continues_at_another_server_in_the_middle_of_a_log_entry",
        ),
    ),
    Fault(
        "a_wait_may_last_for_days",
        "asyncinfer/api/live/wait.py",
        "int(text) > MAX_WAIT_SECONDS:",
        "int(text) > 1000 * MAX_WAIT_SECONDS:",
        ("tests/api/test_predict.py::test_a_wait_that_is_no_number_or_too_long_is_refused",),
    ),
    Fault(
        "those_who_wait_are_not_woken",
        "asyncinfer/api/live/inbox.py",
        "if not ticket.ended_job.done():",
        "if ticket.ended_job.done():",
        ("tests/api/test_jobs.py::test_a_stopping_api_answers_waiting_clients",),
    ),
    Fault(
        "ends_of_jobs_are_found_only_by_the_check_of_every_5_s",
        "asyncinfer/api/live/inbox.py",
        "await self._handle_notices(list(parse_inbox_entry(fields)))",
        "list(parse_inbox_entry(fields))",
        ("tests/api/test_jobs.py::test_a_wait_ends_with_the_job",),
    ),
    Fault(
        "a_wait_for_a_deleted_job_takes_its_full_time",
        "asyncinfer/api/live/inbox.py",
        "absent.add(job_id)",
        "absent.discard(job_id)",
        ("tests/faults/test_waiting.py::test_the_next_poll_ends_the_wait_for_a_job_that_is_gone",),
    ),
    Fault(
        "a_wait_goes_on_after_its_client_has_disconnected",
        "asyncinfer/api/live/wait.py",
        "group.start_soon(_cancel_on_disconnect, request, group.cancel_scope)",
        "",
        ("tests/api/test_jobs.py::test_nothing_waits_for_a_client_that_disconnected",),
    ),
    Fault(
        "a_stream_begins_again_at_the_position_in_its_query",
        "asyncinfer/api/handlers/events.py",
        'request.header(b"last-event-id") or request.query.last_event_id',
        'request.query.last_event_id or request.header(b"last-event-id")',
        ("tests/api/test_events.py::test_a_client_that_saw_the_end_and_reconnects_gets_a_204",),
    ),
    Fault(
        "the_end_of_a_retried_job_is_not_streamed",
        "asyncinfer/api/handlers/events.py",
        "position.ended and stored.has_ended and position.ended == stored.round",
        "position.ended and stored.has_ended",
        ("tests/api/test_events.py::test_a_client_that_saw_the_end_and_reconnects_gets_a_204",),
    ),
    Fault(
        "a_usual_submit_takes_a_path_that_a_proxy_reads_differently",
        "asyncinfer/api/express.py",
        'path: bytes = scope["raw_path"]',
        'path: bytes = scope["path"].encode()',
        ("tests/api/test_express.py::test_both_ways_give_the_same_answers_byte_by_byte",),
    ),
    Fault(
        "a_body_that_the_short_way_leaves_to_the_ordinary_one_is_lost",
        "asyncinfer/api/express.py",
        "exchange.add_body(body)",
        "",
        ("tests/api/test_express.py::test_both_ways_give_the_same_answers_byte_by_byte",),
    ),
    Fault(
        "a_key_without_the_scope_submits",
        "asyncinfer/api/express.py",
        "check_scope(_ROUTE, request)",
        "",
        ("tests/api/test_guard.py::test_every_route_needs_its_scope",),
    ),
    Fault(
        "a_key_revoked_during_a_small_body_still_submits",
        "asyncinfer/api/express.py",
        "request.admission.check()",
        "",
        (
            "tests/api/test_revoked.py::test_a_body_that_is_still_coming_when_its_key_is_revoked_makes_no_job",
        ),
    ),
    Fault(
        "answers_to_a_client_that_reads_none_pile_up",
        "asyncinfer/api/http/connection.py",
        "or self.is_writing_paused",
        "",
        ("tests/api/test_express.py::test_answers_to_a_client_that_reads_none_do_not_pile_up",),
    ),
    # --- the client
    Fault(
        "a_repeated_submit_has_another_key",
        "asyncinfer/client/_flows/submitting.py",
        '"idempotency-key": job.key}',
        '"idempotency-key": uuid.uuid4().hex}',
        ("tests/client/test_client.py::test_an_idempotency_key_makes_a_single_job",),
    ),
    Fault(
        "a_bad_row_gives_its_error_to_the_rows_behind_it",
        "asyncinfer/client/_map/jobs.py",
        "errors[place] if place in errors else next(results) for place in range(len(block))",
        "*errors.values(), *results",
        ("tests/client/test_map.py::test_one_bad_row_in_10000_is_an_error_of_its_own",),
    ),
    Fault(
        "a_missing_value_of_pandas_is_no_missing_value",
        "asyncinfer/client/_encoding.py",
        'is_missing = value is None or type(value).__name__ == "NAType"',
        "is_missing = value is None",
        ("tests/client/test_missing_values.py::test_floats_take_booleans_and_missing_values",),
    ),
    Fault(
        "an_error_has_the_class_of_a_more_special_one",
        "asyncinfer/client/_errors.py",
        "for kind in reversed(vars(errors).values())",
        "for kind in vars(errors).values()",
        (
            "tests/client/test_failures.py::test_of_two_classes_with_one_code_the_base_class_is_raised",
        ),
    ),
    Fault(
        "a_clock_that_is_ahead_makes_negative_times",
        "asyncinfer/api/timelines.py",
        "at_ms = min(at_ms, first_later_ms)",
        "at_ms = max(at_ms, first_later_ms)",
        (
            "tests/api/test_timeline.py::test_no_time_is_negative_though_every_clock_shows_another_hour",
        ),
    ),
    # --- settings and commands
    Fault(
        "a_worker_drains_for_longer_than_its_container_may_take_to_stop",
        "asyncinfer/settings.py",
        "] = 20.0",
        "] = 200.0",
        ("tests/deploy/test_deploy.py::test_a_stop_waits_longer_than_a_worker_drains",),
    ),
    Fault(
        "a_failed_job_is_kept_as_long_as_others",
        "asyncinfer/cli/serve/configuration.py",
        "failed_ttl_seconds=settings.failed_ttl,",
        "failed_ttl_seconds=settings.job_ttl,",
        ("tests/cli/test_configuration.py::test_each_setting_of_jobs_is_a_rule_of_the_store",),
    ),
    Fault(
        "a_command_that_timed_out_exits_as_one_that_failed",
        "asyncinfer/cli/exit_codes.py",
        "return EXIT_TIMED_OUT",
        "return EXIT_FAILED",
        ("tests/cli/test_waiting.py::test_predict_ends_at_its_timeout_and_can_be_continued",),
    ),
    # --- processes, and the end of a worker
    Fault(
        "serve_ends_when_its_worker_is_killed",
        "asyncinfer/processes/supervisor.py",
        "if code == self._refused_exit:",
        "if code != self._refused_exit:",
        ("tests/processes/test_supervisor.py::test_a_killed_worker_is_started_again",),
    ),
    Fault(
        "serve_ends_without_draining_its_worker",
        "asyncinfer/processes/supervisor.py",
        "await drain(restarter.child, plan.drain_seconds, stop.hurry_requested)",
        "drain(restarter.child, plan.drain_seconds, stop.hurry_requested)",
        (
            "tests/processes/test_supervisor.py::test_a_signal_ends_the_api_then_the_worker_then_valkey",
        ),
    ),
    Fault(
        "a_child_outlives_its_killed_parent",
        "asyncinfer/processes/child_process.py",
        "_PR_SET_PDEATHSIG: Final = 1",
        "_PR_SET_PDEATHSIG: Final = 2",
        ("tests/processes/test_child_process.py::test_the_child_of_a_killed_parent_ends",),
    ),
    Fault(
        "ctrl_c_reaches_the_children_of_serve",
        "asyncinfer/processes/child_process.py",
        "start_new_session=True,",
        "start_new_session=False,",
        (
            "tests/processes/test_child_process.py::test_ctrl_c_in_the_parents_terminal_does_not_reach_the_child",
            "tests/processes/test_valkey.py::test_ctrl_c_does_not_end_it_before_its_serve_does",
        ),
    ),
    Fault(
        "all_jobs_of_a_run_that_took_too_long_fail",
        "asyncinfer/worker/running/runner.py",
        "if len(run.batch.jobs) > 1:",
        "if len(run.batch.jobs) == 1:",
        (
            "tests/faults/test_time_outs.py::test_a_job_with_an_endless_run_fails_alone_among_those_that_shared_its_run",
        ),
    ),
    Fault(
        "an_idle_worker_looks_only_when_the_doorbell_rings",
        "asyncinfer/worker/claiming/claim_waiter.py",
        "        seconds = self._brpop_timeout_seconds",
        "        seconds = 60.0",
        (
            "tests/faults/test_idle_workers.py::test_a_worker_frozen_while_it_waited_delays_a_job_by_one_look_of_another",
            "tests/faults/test_doorbell.py::test_a_lost_doorbell_token_delays_a_job_by_one_poll_at_most",
        ),
    ),
    Fault(
        "a_full_batch_waits_for_one_job_more",
        "asyncinfer/worker/claiming/batch_window.py",
        "if count >= self.queues[queue].full_jobs:",
        "if count > self.queues[queue].full_jobs:",
        (
            "tests/faults/test_max_wait.py::test_a_full_batch_does_not_wait_and_the_remaining_jobs_do",
        ),
        only_soak=True,
    ),
    Fault(
        "a_drain_that_takes_too_long_fails_its_jobs",
        "asyncinfer/worker/worker.py",
        'held.run.stop_for("drain")',
        'held.run.stop_for("timeout")',
        (
            "tests/faults/test_drain.py::test_after_an_interrupted_drain_no_further_run_of_a_claim_starts",
            "tests/faults/test_drain.py::test_a_drain_that_takes_too_long_releases_its_jobs_without_counting_a_delivery",
        ),
        only_soak=True,
    ),
    Fault(
        "a_second_signal_does_not_end_a_worker",
        "asyncinfer/worker/process.py",
        "            os._exit(_SECOND_SIGNAL_EXIT)",
        "            return",
        (
            "tests/faults/test_drain.py::test_a_second_signal_ends_a_worker_at_once_and_loses_no_job",
        ),
        only_soak=True,
    ),
    Fault(
        "a_job_without_memory_is_retried_for_ever",
        "asyncinfer/worker/running/outcomes.py",
        "errors = (job.record.errors if job.record else 0) + 1",
        "errors = job.record.errors if job.record else 0",
        (
            "tests/faults/test_time_outs.py::test_a_job_whose_run_gets_no_memory_is_retried_and_then_a_dead_letter",
        ),
        only_soak=True,
    ),
    Fault(
        "a_result_that_cannot_be_stored_is_dropped",
        "asyncinfer/worker/running/completion.py",
        "                if self._given_up:",
        "                if not self._given_up:",
        (
            "tests/faults/test_redis_outage.py::test_a_result_that_could_not_be_stored_is_stored_when_redis_is_back",
        ),
        only_soak=True,
    ),
    # --- connections to Redis
    Fault(
        "bytes_that_arrive_are_no_sign_of_life",
        "asyncinfer/repository/link.py",
        "return came >= _MOVED_BYTES or went >= _MOVED_BYTES",
        "return went >= _MOVED_BYTES",
        (
            "tests/faults/test_slow_links.py::test_a_16_mb_result_is_read_over_5_mb_a_second_and_sent_once",
        ),
    ),
    Fault(
        "bytes_that_leave_are_no_sign_of_life",
        "asyncinfer/repository/link.py",
        "went = self._seen_unsent_bytes - unsent_bytes",
        "went = 0",
        (
            "tests/faults/test_slow_links.py::test_an_8_mb_input_is_accepted_over_5_mb_a_second_and_sent_once",
        ),
    ),
    Fault(
        "a_late_reply_is_not_looked_at_while_it_arrives",
        "asyncinfer/repository/link.py",
        "if self._looks_late and self._waiting:",
        "if False:",
        (
            "tests/faults/test_slow_links.py::test_silence_is_counted_from_the_last_byte_of_a_value_that_was_waited_for",
        ),
    ),
    Fault(
        "large_replies_come_before_small_ones",
        "asyncinfer/repository/store.py",
        "ask = self._lanes.ask if is_large else self._link.ask",
        "ask = self._link.ask",
        ("tests/faults/test_slow_links.py::test_a_small_submit_passes_beside_large_results",),
        only_soak=True,
    ),
    # --- metrics
    Fault(
        "what_a_killed_process_has_counted_is_dropped",
        "asyncinfer/api/process_figures.py",
        "self._ended.add(Figures(figures.counts, figures.histograms))",
        "self._ended.add(Figures())",
        (
            "tests/processes/test_process_metrics.py::test_what_a_killed_process_has_counted_stays_and_what_it_held_goes",
        ),
    ),
    Fault(
        "a_repeated_submit_is_counted_again",
        "asyncinfer/repository/submissions.py",
        'reply.count(b"ok")',
        "len(jobs)",
        (
            "tests/api/test_metrics.py::test_accepted_jobs_and_refusals_are_counted_also_of_bulk_lines",
        ),
    ),
    Fault(
        "any_name_in_redis_becomes_a_label",
        "asyncinfer/api/families.py",
        "is_own = found.is_announced and found.model is not None",
        "is_own = found.model is not None",
        ("tests/api/test_metrics.py::test_models_that_nobody_announced_share_one_label",),
    ),
    Fault(
        "submits_of_the_short_way_are_not_counted",
        "asyncinfer/api/express.py",
        "path.accepted.observe(seconds)",
        "pass",
        ("tests/api/test_express.py::test_each_submit_is_counted_once_by_either_way",),
    ),
    Fault(
        "refusals_of_the_short_way_are_not_counted_as_requests",
        "asyncinfer/api/express.py",
        "self._api.request_figures.answered(_key(path.template, reply.status), seconds)",
        "pass",
        (
            "tests/api/test_express.py::test_both_ways_give_the_same_reason_for_a_job_that_is_not_accepted",
        ),
    ),
    Fault(
        "a_client_that_leaves_the_short_way_is_not_counted",
        "asyncinfer/api/http/connection.py",
        "if self._finish and self._answering:",
        "if False:",
        (
            "tests/api/test_express.py::test_a_client_that_leaves_before_the_end_of_its_body_is_counted_by_either_way",
        ),
    ),
    Fault(
        "who_closes_the_sending_side_gets_no_answer",
        "asyncinfer/api/http/connection.py",
        "if answering is None or not answering.is_open:",
        "if True:",
        (
            "tests/api/test_connection.py::test_a_client_that_closes_its_sending_side_gets_its_answers",
        ),
    ),
    Fault(
        "who_is_gone_is_waited_for_as_long_as_it_asked",
        "asyncinfer/api/http/connection.py",
        "exchange.take_for_gone()",
        "pass",
        (
            "tests/api/test_connection.py::test_who_has_closed_the_sending_side_waits_and_follows_for_two_seconds_at_most",
        ),
    ),
    Fault(
        "errors_of_requests_are_not_counted",
        "asyncinfer/api/app.py",
        "self.request_figures.refused(error.code)",
        "pass",
        ("tests/api/test_express.py::test_each_submit_is_counted_once_by_either_way",),
    ),
    Fault(
        "a_redis_that_takes_no_jobs_looks_well_in_the_metrics",
        "asyncinfer/repository/inspect/overview.py",
        "return await why_no_jobs(store) is None",
        "return True",
        (
            "tests/api/test_metrics.py::test_while_redis_takes_no_jobs_the_metrics_say_so_and_count_why",
        ),
    ),
    Fault(
        "a_right_that_only_jobs_need_is_found_missing_by_jobs_alone",
        "asyncinfer/repository/lua/submit.lua",
        "if not redis.acl_check_cmd(unpack(call)) then redis.call(unpack(call)) end",
        "",
        (
            "tests/repository/test_rights.py::test_each_command_of_a_submit_that_is_denied_is_found_without_a_job",
        ),
    ),
    Fault(
        "labels_have_no_bound",
        "asyncinfer/monitoring/counts.py",
        "elif len(self) < MAX_SERIES:",
        "elif True:",
        ("tests/monitoring/test_exposition.py::test_labels_beyond_the_bound_share_one_series",),
    ),
    # --- webhooks
    Fault(
        "a_webhook_goes_to_what_its_name_means_now",
        f"{_WEBHOOKS}/posting.py",
        "str(address), port, _CONNECT_SECONDS",
        "host, port, _CONNECT_SECONDS",
        (
            "tests/webhooks/test_posting.py::test_the_connection_goes_to_the_address_that_was_checked",
        ),
    ),
    Fault(
        "an_address_is_not_checked_where_it_is_connected",
        f"{_WEBHOOKS}/posting.py",
        "self._rules.check_address(host, port, address)",
        "pass",
        (
            "tests/webhooks/test_posting.py::test_a_name_that_comes_to_mean_an_inner_address_is_not_called",
        ),
    ),
    Fault(
        "what_a_receiver_sends_is_not_metered",
        f"{_WEBHOOKS}/network.py",
        "if self._left <= 0:",
        "if self._left is None:",
        ("tests/webhooks/test_posting.py::test_an_answer_without_end_costs_little",),
    ),
    Fault(
        "a_tenant_may_have_all_places_for_webhooks",
        f"{_WEBHOOKS}/hosts.py",
        "return min(free_of_all, self._tenant_places - self._running[tenant])",
        "return free_of_all",
        (
            "tests/webhooks/test_hosts.py::test_the_hosts_of_one_tenant_leave_places_of_each_kind_to_others",
        ),
    ),
    Fault(
        "a_redelivery_waits_for_the_pause_of_its_host",
        f"{_WEBHOOKS}/hosts.py",
        "is_open = host.waiting[0].is_redelivered or not self._is_closed(host)",
        "is_open = not self._is_closed(host)",
        (
            "tests/webhooks/test_hosts.py::test_a_redelivery_is_tried_at_once_though_its_host_is_closed",
        ),
    ),
    Fault(
        "a_setting_allows_the_metadata_of_a_cloud",
        f"{_WEBHOOKS}/url_rules.py",
        "if addresses.is_metadata(address):",
        "if addresses.is_metadata(address) and (host, port) not in self._allowed:",
        ("tests/webhooks/test_url_rules.py::test_no_setting_allows_the_metadata_of_a_cloud",),
    ),
    Fault(
        "each_try_of_a_webhook_makes_its_body",
        f"{_WEBHOOKS}/sender.py",
        "body = delivery.body or await self._keep_body(held)",
        "body = await self._keep_body(held) and self._bodies.of(delivery, 0)[0]",
        ("tests/webhooks/test_sender.py::test_each_try_has_the_same_id_and_body",),
    ),
    Fault(
        "a_webhook_without_a_secret_is_sent",
        f"{_WEBHOOKS}/sender.py",
        "if self._checks.needs_secret and not keys:",
        "if self._checks.needs_secret and keys is None:",
        (
            "tests/webhooks/test_sender.py::test_where_keys_are_in_use_nothing_is_sent_without_a_secret",
        ),
    ),
    Fault(
        "an_outcome_is_not_noted_after_an_outage",
        f"{_WEBHOOKS}/sender.py",
        "await pause_before_retry(self._closing)",
        "return",
        ("tests/webhooks/test_lost_replies.py::test_an_outcome_is_noted_once_redis_is_back",),
    ),
)
