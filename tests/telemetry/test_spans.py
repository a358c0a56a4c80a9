"""The spans of a job, from its caller through API and worker: parents, links, attributes, times."""

import asyncio
import json

import httpx2
import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import Client, JobFailed
from asyncinfer.jobs import SCHEMA, Record, TraceContext
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob, Submissions
from tests.api.harness import announce, client_of, running
from tests.faults.harness import eventually
from tests.faults.proxy import proxied

from .harness import Deployment, Service, Spans, attributes_of, context_of, links_of, parent_id

ROW = [[5.1, 3.5, 1.4, 0.2]]
QUEUE = "predict_queue"


async def test_a_job_has_four_spans_in_the_trace_of_its_caller(
    deployment: Deployment, spans: Spans
) -> None:
    async with deployment.service(spans, spans.tracing(), spans.tracing()) as service:
        with spans.caller() as caller:
            job = await service.client.submit(ROW, "iris")
        await job.result()
        await spans.wait_for("finish", 1)

    by_name = {span.name: span for span in spans.all()}
    submit = by_name["POST /predict/{model}"]
    queued, run, finish = (by_name[f"{word} {QUEUE}"] for word in ("queued", "run", "finish"))
    assert {context_of(span).trace_id for span in spans.all()} == {context_of(caller).trace_id}
    assert parent_id(submit) == context_of(caller).span_id
    submit_id = context_of(submit).span_id
    assert [parent_id(span) for span in (queued, run, finish)] == [submit_id] * 3
    assert [span.kind for span in (submit, queued, run, finish)] == [
        SpanKind.SERVER,
        SpanKind.INTERNAL,
        SpanKind.CONSUMER,
        SpanKind.CLIENT,
    ]
    assert links_of(run) == [submit_id]
    assert links_of(finish) == [context_of(run).span_id]
    assert all(span.status.status_code is StatusCode.UNSET for span in spans.all())

    http = attributes_of(submit)
    assert http["http.request.method"] == "POST"
    assert http["http.route"] == "/predict/{model}"
    assert http["url.path"] == "/predict/iris"
    assert http["http.response.status_code"] == 202
    of_job = {
        "messaging.system": "asyncinfer",
        "messaging.destination.name": QUEUE,
        "messaging.message.id": job.id,
        "asyncinfer.job.delivery": 1,
        "asyncinfer.job.round": 1,
    }
    for span in (queued, run, finish):
        assert of_job.items() <= attributes_of(span).items()
    assert attributes_of(run)["messaging.operation.type"] == "process"
    assert attributes_of(finish)["messaging.operation.type"] == "settle"
    of_run = {
        "asyncinfer.batch.jobs": 1,
        "asyncinfer.batch.rows": 1,
        "asyncinfer.model.name": "iris",
        "asyncinfer.model.version": "1",
        "asyncinfer.engine.provider": "CPUExecutionProvider",
    }
    assert of_run.items() <= attributes_of(run).items()
    assert attributes_of(finish)["asyncinfer.job.outcome"] == "completed"

    times = [(span.start_time or 0, span.end_time or 0) for span in (queued, run, finish)]
    assert all(start <= end for start, end in times)
    assert [end for _, end in times[:2]] <= [start for start, _ in times[1:]]
    assert times[0][1] <= times[1][0] <= times[1][1] <= times[2][0]
    # The record has whole milliseconds.
    assert abs(times[0][0] - (submit.start_time or 0)) < 1e9


async def _submit_together(service: Service, callers: int) -> list[int]:
    """Submits a job for each caller while the model is paused, so that one run has all of them;
    returns the ids of the callers' spans, once the jobs have ended."""
    await service.client.pause("iris")
    jobs, caller_ids = [], []
    for _ in range(callers):
        with service.spans.caller() as caller:
            jobs.append(await service.client.submit(ROW, "iris"))
            caller_ids.append(context_of(caller).span_id)
    await service.client.resume("iris")
    await asyncio.gather(*(job.result() for job in jobs))
    await service.spans.wait_for("finish", callers)
    return caller_ids


async def test_a_run_of_several_traces_links_to_each_and_each_end_links_to_the_run(
    deployment: Deployment, spans: Spans
) -> None:
    async with deployment.service(spans, spans.tracing(), spans.tracing()) as service:
        await _submit_together(service, 3)

    (run,) = spans.named("run")
    assert parent_id(run) is None
    assert sorted(links_of(run)) == sorted(context_of(span).span_id for span in spans.named("POST"))
    assert attributes_of(run)["messaging.batch.message_count"] == 3
    assert attributes_of(run)["asyncinfer.batch.rows"] == 3
    assert "messaging.message.id" not in attributes_of(run)
    assert [links_of(finish) for finish in spans.named("finish")] == [[context_of(run).span_id]] * 3
    by_id = {context_of(span).span_id: span for span in spans.named("POST")}
    for span in (*spans.named("queued"), *spans.named("finish")):
        submit = by_id[parent_id(span) or 0]
        assert context_of(span).trace_id == context_of(submit).trace_id
    assert len({context_of(span).trace_id for span in spans.named("finish")}) == 3


async def test_the_run_of_a_batch_is_recorded_where_only_callers_decide_what_is(
    deployment: Deployment, spans: Spans
) -> None:
    of_caller = ParentBased(ALWAYS_OFF)
    tracings = (spans.tracing(of_caller), spans.tracing(of_caller))
    async with deployment.service(spans, *tracings) as service:
        await _submit_together(service, 2)
        assert len(spans.named("run")) == 1
        await service.client.predict(ROW, "iris")  # without a caller's span

    assert [len(spans.named(word)) for word in ("POST", "queued", "run", "finish")] == [2, 2, 1, 2]


async def test_the_lines_of_a_request_are_jobs_of_its_trace_and_their_run_too(
    deployment: Deployment, spans: Spans
) -> None:
    async with deployment.service(spans, spans.tracing(), spans.tracing()) as service:
        await service.client.pause("iris")
        lines = "\n".join(json.dumps({"data": ROW}) for _ in range(3))
        async with httpx2.AsyncClient(base_url=service.client.url) as http:
            headers = {"content-type": "application/x-ndjson"}
            reply = await http.post("/predict/iris", content=lines, headers=headers)
        assert reply.status_code == 200
        await service.client.resume("iris")
        await spans.wait_for("finish", 3)

    (submit,) = spans.named("POST")
    (run,) = spans.named("run")
    assert attributes_of(submit)["http.response.status_code"] == 200
    assert [parent_id(span) for span in spans.named("finish")] == [context_of(submit).span_id] * 3
    assert parent_id(run) == context_of(submit).span_id
    assert links_of(run) == [context_of(submit).span_id]


async def test_a_map_in_threads_continues_the_trace_of_its_caller(
    deployment: Deployment, spans: Spans
) -> None:
    def predict_all(url: str) -> int:
        with Client(url) as client:
            return len(list(client.map(ROW * 3, "iris", progress=False)))

    async with deployment.service(spans, spans.tracing(), spans.tracing()) as service:
        with spans.caller() as caller:
            assert await asyncio.to_thread(predict_all, service.client.url) == 3
        await spans.wait_for("finish", len(spans.named("queued")))

    assert spans.named("POST")
    assert {context_of(span).trace_id for span in spans.named("POST")} == {
        context_of(caller).trace_id
    }


async def test_a_failed_job_is_an_error_with_its_code_and_nothing_of_its_input(
    deployment: Deployment, spans: Spans
) -> None:
    services = deployment.service(spans, spans.tracing(), spans.tracing(), ("iris", "picky"))
    async with services as service:
        with pytest.raises(JobFailed):
            await service.client.predict([[7654321.0]], "picky")
        await spans.wait_for("finish", 1)

    for word in ("run", "finish"):
        (span,) = spans.named(word)
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "model_failed"
        assert attributes_of(span)["error.type"] == "model_failed"
    assert attributes_of(spans.named("finish")[0])["asyncinfer.job.outcome"] == "failed"
    assert "7654321" not in "".join(span.to_json() for span in spans.all())


async def test_a_request_that_is_refused_has_a_span_with_its_status(
    deployment: Deployment, spans: Spans
) -> None:
    async with (
        deployment.service(spans, spans.tracing(), None) as service,
        httpx2.AsyncClient(base_url=service.client.url) as http,
    ):
        await http.post("/predict/iris", json={"data": [[1]]})

    (submit,) = spans.named("POST")
    assert attributes_of(submit)["http.response.status_code"] == 422
    assert submit.status.status_code is StatusCode.UNSET


async def test_an_answer_without_redis_is_an_error_of_the_api_with_its_code(
    deployment: Deployment, spans: Spans, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    async with proxied(deployment.redis_url) as proxy:
        config = ApiConfig(redis_url=proxy.url, policy=deployment.policy, tracing=spans.tracing())
        async with running(config) as port, client_of(port) as http:
            proxy.black_hole()
            reply = await http.post("/predict", json={"data": ROW})
            proxy.restore()

    assert reply.status_code == 503
    (submit,) = spans.named("POST")
    assert attributes_of(submit)["http.response.status_code"] == 503
    assert attributes_of(submit)["error.type"] == "redis_unavailable"
    assert submit.status.status_code is StatusCode.ERROR


@pytest.mark.soak
async def test_a_retry_is_another_round_in_the_same_trace(
    deployment: Deployment, spans: Spans
) -> None:
    services = deployment.service(spans, spans.tracing(), spans.tracing(), ("iris", "picky"))
    async with services as service:
        job = await service.client.submit([[9.0]], "picky")
        with pytest.raises(JobFailed):
            await job.result()
        again = await job.retry()
        with pytest.raises(JobFailed):
            await again.result()
        await spans.wait_for("finish", 2)

    for word in ("queued", "run", "finish"):
        first, second = spans.named(word)
        assert parent_id(first) == parent_id(second)
        rounds = [attributes_of(span)["asyncinfer.job.round"] for span in (first, second)]
        assert rounds == [1, 2]


async def test_a_trace_that_its_caller_does_not_record_costs_nothing(
    deployment: Deployment, spans: Spans
) -> None:
    async with deployment.service(spans, spans.tracing(), spans.tracing()) as service:
        with spans.caller(ALWAYS_OFF):
            job = await service.client.submit(ROW, "iris")
        await job.result()
        assert service.record_of(job.id).trace is None
        with spans.caller(ALWAYS_ON):
            await service.client.predict(ROW, "iris")
        await spans.wait_for("finish", 1)

    assert [len(spans.named(word)) for word in ("POST", "queued", "run", "finish")] == [1] * 4


async def test_a_trace_passes_through_an_api_that_makes_no_spans(
    deployment: Deployment, spans: Spans
) -> None:
    async with deployment.service(spans, None, spans.tracing()) as service:
        with spans.caller() as caller:
            job = await service.client.submit(ROW, "iris")
        await job.result()
        await spans.wait_for("finish", 1)

    assert [parent_id(span) for span in spans.named("queued")] == [context_of(caller).span_id]


async def test_tracestate_reaches_the_worker_and_a_malformed_traceparent_begins_a_trace(
    deployment: Deployment, spans: Spans
) -> None:
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    async with deployment.service(spans, spans.tracing(), spans.tracing()) as service:
        async with httpx2.AsyncClient(base_url=service.client.url) as http:
            for header in (parent, parent.upper()):
                headers = {"traceparent": header, "tracestate": "vendor=1,other=2"}
                wait = {"prefer": "wait=10"}
                reply = await http.post("/predict", json={"data": ROW}, headers=headers | wait)
                assert reply.status_code == 200
        await spans.wait_for("finish", 2)

    known, begun = spans.named("finish")
    assert f"{context_of(known).trace_id:032x}" == "ab" * 16
    assert context_of(known).trace_state.to_header() == "vendor=1,other=2"
    assert f"{context_of(begun).trace_id:032x}" != "ab" * 16
    assert not context_of(begun).trace_state


async def test_a_worker_without_traces_runs_jobs_that_have_one_and_keeps_it_in_the_record(
    deployment: Deployment, spans: Spans
) -> None:
    async with deployment.service(spans, spans.tracing(), None) as service:
        job = await service.client.submit(ROW, "iris")
        await job.result()
        record = service.record_of(job.id)

    (submit,) = spans.all()
    context = context_of(submit)
    assert record.finished_ms is not None
    assert record.trace == TraceContext(
        f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    )


@pytest.mark.parametrize("parent", [f"00-{'ab' * 16}-{'cd' * 8}-01", "00-no-trace-01", "x" * 5000])
async def test_whatever_a_record_says_its_job_runs_and_its_spans_can_be_exported(
    parent: str, deployment: Deployment, spans: Spans, store: Store
) -> None:
    record = Record(
        SCHEMA,
        QUEUE,
        "iris",
        "default",
        -5,
        round=2**64 - 1,
        errors=2**64 - 1,
        trace=TraceContext(parent, "no state"),
    )
    job = NewJob("strange", QUEUE, json.dumps(ROW).encode(), record)
    async with deployment.service(spans, None, spans.tracing()):
        submissions = Submissions(store)
        await submissions.submit_many(QUEUE, [job])
        await eventually(lambda: _is_completed(submissions, "strange"), "the job is completed")

    assert len(spans.all()) == (3 if parent.startswith("00-ab") else 0)
    assert encode_spans(spans.all()).SerializeToString() or not spans.all()


async def _is_completed(submissions: Submissions, job_id: str) -> bool:
    return await submissions.statuses([job_id]) == ["completed"]
