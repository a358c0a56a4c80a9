"""A simulation of scaling by backlog in seconds and by queue length; `python -m` prints a table.

The controller is modelled on KEDA 2 with a Kubernetes HPA (autoscaling/v2), with its defaults
except for the times in `Cluster`. A slot runs one job at a time; batches would speed up all
policies. Time is virtual.
"""

import heapq
import itertools
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from asyncinfer.worker.running.timings import JobTimes


class Cluster(Struct, frozen=True, kw_only=True):
    """The cluster and its controller's settings."""

    slots_per_pod: int = 2
    max_pods: int = 20
    pod_start_seconds: float = 20
    poll_seconds: float = 15
    down_window_seconds: float = 300
    accepted_wait_seconds: float = 30

    @property
    def target_seconds(self) -> float:
        """The backlog that a pod's slots run within the accepted wait, in seconds of run time."""
        return self.slots_per_pod * self.accepted_wait_seconds


class Demand(Struct, frozen=True, kw_only=True):
    """The jobs of one model: their rate at each time, and their mean run time."""

    model: str
    run_seconds: float
    jobs_per_second: Callable[[float], float]
    max_jobs_per_second: float
    cancelled: bool = False
    """Whether jobs that have not started are cancelled 30 s after their arrival."""


class Scenario(Struct, frozen=True, kw_only=True):
    name: str
    seconds: float
    spike_ends_at: float
    demands: tuple[Demand, ...]
    tuned_seconds: float
    """The run time that one target length for all models assumes: the mean of all jobs."""
    fixed_pods: int


class QueueState(Struct, frozen=True):
    """What a policy knows at a poll, by model."""

    due: Mapping[str, int]
    list_lengths: Mapping[str, int]
    """These include the ids of cancelled jobs that are still in the list."""
    seconds_per_job: Mapping[str, float]
    ready_pods: int


Policy = Callable[[QueueState], list[float]]
"""The number of pods that each trigger requests."""


class Outcome(Struct, frozen=True):
    submitted: int
    finished: int
    cancelled: int
    drain_seconds: float
    """The time from the end of the spike until all jobs that arrived before it have started."""
    p95_wait_seconds: float
    """Of the model whose jobs waited longest."""
    worker_hours: float


# --- policies ------------------------------------------------------------------------------


def by_backlog(target_seconds: float) -> Policy:
    """Scales by backlog_seconds and starved, as `GET /scale/{model}` returns them."""

    def pods(state: QueueState) -> list[float]:
        starved = [1.0 for jobs in state.due.values() if jobs and not state.ready_pods]
        return starved + [
            jobs * state.seconds_per_job[model] / target_seconds
            for model, jobs in state.due.items()
            if model in state.seconds_per_job
        ]

    return pods


def by_length(target_jobs: Mapping[str, float]) -> Policy:
    """Scales by the length of each model's list, divided by its target per pod."""
    return lambda state: [
        length / target_jobs[model] for model, length in state.list_lengths.items()
    ]


def fixed(pods: int) -> Policy:
    return lambda _: [float(pods)]


class Controller:
    """KEDA between no pod and one, the HPA above."""

    def __init__(self, policy: Policy, cluster: Cluster) -> None:
        self._policy = policy
        self._cluster = cluster
        self._recommendations: deque[tuple[float, int]] = deque()
        self._active_at = -math.inf

    def pods(self, now: float, current: int, state: QueueState) -> int:
        """The number of pods from this poll on."""
        wanted = max(self._policy(state), default=0.0)
        if wanted > 0:
            self._active_at = now
        if current == 0:
            return 1 if wanted > 0 else 0
        if now - self._active_at >= self._cluster.down_window_seconds:
            return 0
        return self._hpa(now, current, wanted)

    def _hpa(self, now: float, current: int, wanted: float) -> int:
        pods = current if abs(wanted / current - 1) <= 0.1 else math.ceil(wanted)
        pods = min(max(pods, 1), self._cluster.max_pods)
        self._recommendations.append((now, pods))
        while self._recommendations[0][0] <= now - self._cluster.down_window_seconds:
            self._recommendations.popleft()
        if pods > current:
            return min(pods, max(2 * current, current + 4))
        return min(current, max(recommended for _, recommended in self._recommendations))


# --- the simulation ------------------------------------------------------------------------


class _Job(Struct):
    model: str
    arrived_at: float
    run_seconds: float
    started_at: float | None = None
    cancelled: bool = False


class _Pod(Struct, eq=False):
    created_at: float
    is_ready: bool = False
    is_stopping: bool = False
    busy_slots: int = 0


class Simulation:
    def __init__(
        self, scenario: Scenario, policy: Policy, cluster: Cluster, *, pods: int = 0, seed: int = 1
    ) -> None:
        self._scenario = scenario
        self._cluster = cluster
        self._controller = Controller(policy, cluster)
        self._paces = JobTimes()
        self._lists: dict[str, deque[_Job]] = {demand.model: deque() for demand in scenario.demands}
        self._due = dict.fromkeys(self._lists, 0)
        self._jobs: list[_Job] = []
        self._pods: list[_Pod] = []
        self._finished = 0
        self._worker_seconds = 0.0
        self._turn = 0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        for arrived_at, demand, run_seconds in _arrivals(scenario, seed):
            job = _Job(demand.model, arrived_at, run_seconds)
            self._jobs.append(job)
            self._schedule(arrived_at, partial(self._add_job, job))
            if demand.cancelled:
                self._schedule(arrived_at + 30, partial(self._cancel, job))
        for _ in range(pods):
            self._add_pod(-cluster.pod_start_seconds)
        self._schedule(0.0, self._poll)

    def run(self) -> Outcome:
        now = 0.0
        while self._events and (now < self._scenario.seconds or self._is_busy()):
            now, _, event = heapq.heappop(self._events)
            event(now)
        for pod in list(self._pods):
            self._remove(pod, now)
        spike_ends_at = self._scenario.spike_ends_at
        starts = [
            job.started_at
            for job in self._jobs
            if job.arrived_at <= spike_ends_at and job.started_at is not None
        ]
        return Outcome(
            submitted=len(self._jobs),
            finished=self._finished,
            cancelled=sum(job.cancelled for job in self._jobs),
            drain_seconds=max(0.0, max(starts) - spike_ends_at),
            p95_wait_seconds=max(self._p95_wait_seconds(model) for model in self._lists),
            worker_hours=self._worker_seconds / 3600,
        )

    def _p95_wait_seconds(self, model: str) -> float:
        jobs = [job for job in self._jobs if job.model == model]
        waits = sorted(
            job.started_at - job.arrived_at for job in jobs if job.started_at is not None
        )
        return waits[int(0.95 * len(waits))]

    def _schedule(self, at: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), event))

    def _is_busy(self) -> bool:
        return any(self._due.values()) or any(pod.busy_slots for pod in self._pods)

    def _add_job(self, job: _Job, now: float) -> None:
        self._lists[job.model].append(job)
        self._due[job.model] += 1
        self._start_jobs(now)

    def _cancel(self, job: _Job, now: float) -> None:
        if job.started_at is None:
            job.cancelled = True
            self._due[job.model] -= 1

    # --- pods ------------------------------------------------------------------------------

    def _poll(self, now: float) -> None:
        if now > 0 or not self._pods:
            running = [pod for pod in self._pods if not pod.is_stopping]
            wanted = self._controller.pods(now, len(running), self._state(running))
            for _ in range(wanted - len(running)):
                self._add_pod(now)
            # Kubernetes stops the youngest pods first; they finish their runs.
            for pod in running[max(wanted, 0) :]:
                pod.is_stopping = True
                self._remove_if_idle(pod, now)
        self._schedule(now + self._cluster.poll_seconds, self._poll)

    def _state(self, running: Sequence[_Pod]) -> QueueState:
        return QueueState(
            due=dict(self._due),
            list_lengths={model: len(jobs) for model, jobs in self._lists.items()},
            seconds_per_job=self._paces.seconds_per_job(),
            ready_pods=sum(pod.is_ready for pod in running),
        )

    def _add_pod(self, now: float) -> None:
        pod = _Pod(now)
        self._pods.append(pod)

        def become_ready(now: float) -> None:
            pod.is_ready = True
            self._start_jobs(now)

        self._schedule(now + self._cluster.pod_start_seconds, become_ready)

    def _remove_if_idle(self, pod: _Pod, now: float) -> None:
        if pod.is_stopping and not pod.busy_slots and pod in self._pods:
            self._remove(pod, now)

    def _remove(self, pod: _Pod, now: float) -> None:
        self._pods.remove(pod)
        self._worker_seconds += now - max(0.0, pod.created_at)

    # --- slots -----------------------------------------------------------------------------

    def _start_jobs(self, now: float) -> None:
        for pod in self._pods:
            while (
                pod.is_ready
                and not pod.is_stopping
                and pod.busy_slots < self._cluster.slots_per_pod
            ):
                job = self._next()
                if job is None:
                    return
                self._start(pod, job, now)

    def _next(self) -> _Job | None:
        """Takes a job from each model's list in turn; drops the ids of cancelled jobs."""
        lists = list(self._lists.values())
        self._turn += 1
        for i in range(len(lists)):
            jobs = lists[(self._turn + i) % len(lists)]
            while jobs:
                job = jobs.popleft()
                if not job.cancelled:
                    return job
        return None

    def _start(self, pod: _Pod, job: _Job, now: float) -> None:
        job.started_at = now
        self._due[job.model] -= 1
        pod.busy_slots += 1

        def finish(now: float) -> None:
            pod.busy_slots -= 1
            self._finished += 1
            self._paces.add(job.model, job.run_seconds, 1, at_seconds=now)
            self._remove_if_idle(pod, now)
            self._start_jobs(now)

        self._schedule(now + job.run_seconds, finish)


def _arrivals(scenario: Scenario, seed: int) -> Iterator[tuple[float, Demand, float]]:
    """Poisson arrivals whose rate changes in time, by thinning those of the highest rate."""
    chance = random.Random(seed)
    for demand in scenario.demands:
        now = 0.0
        while (now := now + chance.expovariate(demand.max_jobs_per_second)) < scenario.seconds:
            run_seconds = demand.run_seconds * chance.uniform(0.5, 1.5)
            if chance.random() < demand.jobs_per_second(now) / demand.max_jobs_per_second:
                yield now, demand, run_seconds


# --- scenarios and policies ----------------------------------------------------------------


def _spike(base: float, begins: float, ends: float) -> Callable[[float], float]:
    return lambda now: base * (20 if begins <= now < ends else 1)


def _day(mean: float) -> Callable[[float], float]:
    return lambda now: mean * (1 - 0.95 * math.cos(2 * math.pi * now / 86_400))


def _between(jobs_per_second: float, begins: float, ends: float) -> Callable[[float], float]:
    return lambda now: jobs_per_second if begins <= now < ends else 0.0


def _spiking(run_seconds: float) -> Demand:
    rate = _spike(0.5, 600, 900)
    return Demand(model="a", run_seconds=run_seconds, jobs_per_second=rate, max_jobs_per_second=10)


SPIKE: Final = Scenario(
    name="spike x20 for 5 min, jobs of 1 s",
    seconds=3600,
    spike_ends_at=900,
    demands=(_spiking(1),),
    tuned_seconds=1,
    fixed_pods=3,
)

SCENARIOS: Final = (
    SPIKE,
    replace(
        SPIKE,
        name="the same, a new version takes 4 s",
        demands=(_spiking(4),),
        fixed_pods=6,
    ),
    replace(
        SPIKE,
        name="the spike, then a bulk of 5,000 by mistake, cancelled",
        demands=(
            _spiking(1),
            Demand(
                model="a",
                run_seconds=1,
                max_jobs_per_second=100,
                cancelled=True,
                jobs_per_second=_between(100, 850, 900),
            ),
        ),
    ),
    Scenario(
        name="a day, 0.5 to 20 jobs a minute of 10 s",
        seconds=86_400,
        spike_ends_at=43_200,
        demands=(
            Demand(model="a", run_seconds=10, jobs_per_second=_day(0.17), max_jobs_per_second=0.34),
        ),
        tuned_seconds=10,
        fixed_pods=2,
    ),
    Scenario(
        name="100 : 1, two models, a spike x20 of each",
        seconds=3600,
        spike_ends_at=2400,
        demands=(
            Demand(
                model="fast",
                run_seconds=0.1,
                max_jobs_per_second=40,
                jobs_per_second=_spike(2, 600, 900),
            ),
            Demand(
                model="slow",
                run_seconds=10,
                max_jobs_per_second=1,
                jobs_per_second=_spike(0.05, 2100, 2400),
            ),
        ),
        tuned_seconds=0.34,
        fixed_pods=3,
    ),
)


def policies(scenario: Scenario, cluster: Cluster) -> dict[str, tuple[Policy, int]]:
    """The compared policies by name, each with its pods at the start."""
    target = cluster.target_seconds
    tuned = {demand.model: target / demand.run_seconds for demand in scenario.demands}
    untuned = dict.fromkeys(tuned, target / scenario.tuned_seconds)
    compared = {
        "backlog seconds": (by_backlog(target), 1),
        "queue length": (by_length(untuned), 1),
        f"fixed, {scenario.fixed_pods} workers": (fixed(scenario.fixed_pods), scenario.fixed_pods),
    }
    if len(tuned) > 1:
        compared["queue length, tuned for each model"] = (by_length(tuned), 1)
    return compared


def table(scenarios: Sequence[Scenario] = SCENARIOS) -> Iterator[str]:
    cluster = Cluster()
    yield "| load | scaled by | drained after the spike | p95 wait | worker-hours |"
    yield "|---|---|---|---|---|"
    for scenario in scenarios:
        for name, (policy, pods) in policies(scenario, cluster).items():
            outcome = Simulation(scenario, policy, cluster, pods=pods).run()
            yield (
                f"| {scenario.name} | {name} | {outcome.drain_seconds:.0f} s | "
                f"{outcome.p95_wait_seconds:.0f} s | {outcome.worker_hours:.2f} |"
            )


if __name__ == "__main__":
    sys.stdout.write("\n".join(table()) + "\n")
