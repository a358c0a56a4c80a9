"""Scaling by backlog in seconds and by queue length, in virtual time: `python -m` prints a table.

The controller is modelled on KEDA 2 with a Kubernetes HPA (autoscaling/v2), its defaults but for
the times in `Cluster`. Jobs run one at a time in a slot; batches would speed all policies up.
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

from asyncinfer.worker.running.timings import Paces


class Cluster(Struct, frozen=True, kw_only=True):
    """What scaling is done in, and how."""

    slots_a_pod: int = 2
    most_pods: int = 20
    pod_start_seconds: float = 20
    poll_seconds: float = 15
    down_window_seconds: float = 300
    accepted_wait_seconds: float = 30

    @property
    def target_seconds(self) -> float:
        """Backlog seconds that one pod is given: what it works off within the accepted wait."""
        return self.slots_a_pod * self.accepted_wait_seconds


class Demand(Struct, frozen=True, kw_only=True):
    """Jobs of one model: so many a second at a time, each of about so long."""

    model: str
    run_seconds: float
    jobs_a_second: Callable[[float], float]
    most_a_second: float
    cancelled: bool = False
    """30 s after they came, but for those that have started."""


class Scenario(Struct, frozen=True, kw_only=True):
    name: str
    seconds: float
    spike_ends: float
    demands: tuple[Demand, ...]
    tuned_seconds: float
    """What a person who sets one length for all takes a job to last: the mean of all jobs."""
    fixed_pods: int


class Seen(Struct, frozen=True):
    """What a policy is told at a poll, by model."""

    due: Mapping[str, int]
    listed: Mapping[str, int]
    """With the ids of cancelled jobs that are still in the list."""
    seconds_per_job: Mapping[str, float]
    ready_pods: int


Policy = Callable[[Seen], list[float]]
"""The pods that each trigger asks for."""


class Outcome(Struct, frozen=True):
    submitted: int
    finished: int
    cancelled: int
    drain_seconds: float
    """From the spike's end until all that came before it has started."""
    p95_wait_seconds: float
    """Of the model that waited longer."""
    worker_hours: float


# --- policies ------------------------------------------------------------------------------


def by_backlog(target_seconds: float) -> Policy:
    """As `GET /scale/{model}` gives it: backlog_seconds, and starved."""

    def wanted(seen: Seen) -> list[float]:
        starved = [1.0 for jobs in seen.due.values() if jobs and not seen.ready_pods]
        return starved + [
            jobs * seen.seconds_per_job[model] / target_seconds
            for model, jobs in seen.due.items()
            if model in seen.seconds_per_job
        ]

    return wanted


def by_length(target_jobs: Mapping[str, float]) -> Policy:
    """The length of each model's list over what one pod is given of it."""
    return lambda seen: [jobs / target_jobs[model] for model, jobs in seen.listed.items()]


def fixed(pods: int) -> Policy:
    return lambda _: [float(pods)]


class Controller:
    """KEDA between none and one, the HPA above: `pods` at each poll."""

    def __init__(self, policy: Policy, cluster: Cluster) -> None:
        self._policy = policy
        self._cluster = cluster
        self._asked: deque[tuple[float, int]] = deque()
        self._active_at = -math.inf

    def pods(self, now: float, current: int, seen: Seen) -> int:
        wanted = max(self._policy(seen), default=0.0)
        if wanted > 0:
            self._active_at = now
        if current == 0:
            return 1 if wanted > 0 else 0
        if now - self._active_at >= self._cluster.down_window_seconds:
            return 0
        return self._hpa(now, current, wanted)

    def _hpa(self, now: float, current: int, wanted: float) -> int:
        asked = current if abs(wanted / current - 1) <= 0.1 else math.ceil(wanted)
        asked = min(max(asked, 1), self._cluster.most_pods)
        self._asked.append((now, asked))
        while self._asked[0][0] <= now - self._cluster.down_window_seconds:
            self._asked.popleft()
        if asked > current:
            return min(asked, max(2 * current, current + 4))
        return min(current, max(one for _, one in self._asked))


# --- the simulation ------------------------------------------------------------------------


class _Job(Struct):
    model: str
    came: float
    run_seconds: float
    started: float | None = None
    cancelled: bool = False


class _Pod(Struct, eq=False):
    made: float
    ready: bool = False
    leaving: bool = False
    busy: int = 0


class Simulation:
    def __init__(
        self, scenario: Scenario, policy: Policy, cluster: Cluster, *, pods: int = 0, seed: int = 1
    ) -> None:
        self._scenario = scenario
        self._cluster = cluster
        self._controller = Controller(policy, cluster)
        self._paces = Paces()
        self._lists: dict[str, deque[_Job]] = {one.model: deque() for one in scenario.demands}
        self._due = dict.fromkeys(self._lists, 0)
        self._jobs: list[_Job] = []
        self._pods: list[_Pod] = []
        self._finished = 0
        self._worker_seconds = 0.0
        self._turn = 0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        for came, demand, run_seconds in _arrivals(scenario, seed):
            job = _Job(demand.model, came, run_seconds)
            self._jobs.append(job)
            self._at(came, partial(self._come, job))
            if demand.cancelled:
                self._at(came + 30, partial(self._cancel, job))
        for _ in range(pods):
            self._add_pod(-cluster.pod_start_seconds)
        self._at(0.0, self._poll)

    def run(self) -> Outcome:
        now = 0.0
        while self._events and (now < self._scenario.seconds or self._busy()):
            now, _, happens = heapq.heappop(self._events)
            happens(now)
        for pod in list(self._pods):
            self._remove(pod, now)
        ends = self._scenario.spike_ends
        early = [job.started for job in self._jobs if job.came <= ends and job.started is not None]
        return Outcome(
            submitted=len(self._jobs),
            finished=self._finished,
            cancelled=sum(job.cancelled for job in self._jobs),
            drain_seconds=max(0.0, max(early) - ends),
            p95_wait_seconds=max(self._p95_wait_seconds(model) for model in self._lists),
            worker_hours=self._worker_seconds / 3600,
        )

    def _p95_wait_seconds(self, model: str) -> float:
        ran = [job for job in self._jobs if job.model == model]
        waits = sorted(job.started - job.came for job in ran if job.started is not None)
        return waits[int(0.95 * len(waits))]

    def _at(self, when: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happens))

    def _busy(self) -> bool:
        return any(self._due.values()) or any(pod.busy for pod in self._pods)

    def _come(self, job: _Job, now: float) -> None:
        self._lists[job.model].append(job)
        self._due[job.model] += 1
        self._work(now)

    def _cancel(self, job: _Job, now: float) -> None:
        if job.started is None:
            job.cancelled = True
            self._due[job.model] -= 1

    # --- pods ------------------------------------------------------------------------------

    def _poll(self, now: float) -> None:
        if now > 0 or not self._pods:
            staying = [pod for pod in self._pods if not pod.leaving]
            wanted = self._controller.pods(now, len(staying), self._seen(staying))
            for _ in range(wanted - len(staying)):
                self._add_pod(now)
            # The youngest leave first, as Kubernetes has it; what they run is finished.
            for pod in staying[max(wanted, 0) :]:
                pod.leaving = True
                self._let_go(pod, now)
        self._at(now + self._cluster.poll_seconds, self._poll)

    def _seen(self, staying: Sequence[_Pod]) -> Seen:
        return Seen(
            due=dict(self._due),
            listed={model: len(jobs) for model, jobs in self._lists.items()},
            seconds_per_job=self._paces.seconds_per_job(),
            ready_pods=sum(pod.ready for pod in staying),
        )

    def _add_pod(self, now: float) -> None:
        pod = _Pod(now)
        self._pods.append(pod)

        def ready(now: float) -> None:
            pod.ready = True
            self._work(now)

        self._at(now + self._cluster.pod_start_seconds, ready)

    def _let_go(self, pod: _Pod, now: float) -> None:
        if pod.leaving and not pod.busy and pod in self._pods:
            self._remove(pod, now)

    def _remove(self, pod: _Pod, now: float) -> None:
        self._pods.remove(pod)
        self._worker_seconds += now - max(0.0, pod.made)

    # --- slots -----------------------------------------------------------------------------

    def _work(self, now: float) -> None:
        for pod in self._pods:
            while pod.ready and not pod.leaving and pod.busy < self._cluster.slots_a_pod:
                job = self._next()
                if job is None:
                    return
                self._start(pod, job, now)

    def _next(self) -> _Job | None:
        """From each model's list in turn; the ids of cancelled jobs are dropped on the way."""
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
        job.started = now
        self._due[job.model] -= 1
        pod.busy += 1

        def done(now: float) -> None:
            pod.busy -= 1
            self._finished += 1
            self._paces.note(job.model, job.run_seconds, 1, at_seconds=now)
            self._let_go(pod, now)
            self._work(now)

        self._at(now + job.run_seconds, done)


def _arrivals(scenario: Scenario, seed: int) -> Iterator[tuple[float, Demand, float]]:
    """Poisson arrivals whose rate changes in time, thinned from the highest rate."""
    chance = random.Random(seed)
    for demand in scenario.demands:
        now = 0.0
        while (now := now + chance.expovariate(demand.most_a_second)) < scenario.seconds:
            run_seconds = demand.run_seconds * chance.uniform(0.5, 1.5)
            if chance.random() < demand.jobs_a_second(now) / demand.most_a_second:
                yield now, demand, run_seconds


# --- what is compared ----------------------------------------------------------------------


def _spike(base: float, begins: float, ends: float) -> Callable[[float], float]:
    return lambda now: base * (20 if begins <= now < ends else 1)


def _day(mean: float) -> Callable[[float], float]:
    return lambda now: mean * (1 - 0.95 * math.cos(2 * math.pi * now / 86_400))


def _between(jobs_a_second: float, begins: float, ends: float) -> Callable[[float], float]:
    return lambda now: jobs_a_second if begins <= now < ends else 0.0


def _spiking(run_seconds: float) -> Demand:
    rate = _spike(0.5, 600, 900)
    return Demand(model="a", run_seconds=run_seconds, jobs_a_second=rate, most_a_second=10)


SPIKE: Final = Scenario(
    name="spike x20 for 5 min, jobs of 1 s",
    seconds=3600,
    spike_ends=900,
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
                most_a_second=100,
                cancelled=True,
                jobs_a_second=_between(100, 850, 900),
            ),
        ),
    ),
    Scenario(
        name="a day, 0.5 to 20 jobs a minute of 10 s",
        seconds=86_400,
        spike_ends=43_200,
        demands=(Demand(model="a", run_seconds=10, jobs_a_second=_day(0.17), most_a_second=0.34),),
        tuned_seconds=10,
        fixed_pods=2,
    ),
    Scenario(
        name="100 : 1, two models, a spike x20 of each",
        seconds=3600,
        spike_ends=2400,
        demands=(
            Demand(
                model="fast",
                run_seconds=0.1,
                most_a_second=40,
                jobs_a_second=_spike(2, 600, 900),
            ),
            Demand(
                model="slow",
                run_seconds=10,
                most_a_second=1,
                jobs_a_second=_spike(0.05, 2100, 2400),
            ),
        ),
        tuned_seconds=0.34,
        fixed_pods=3,
    ),
)


def policies(scenario: Scenario, cluster: Cluster) -> dict[str, tuple[Policy, int]]:
    """Each with the pods it begins with."""
    target = cluster.target_seconds
    tuned = {one.model: target / one.run_seconds for one in scenario.demands}
    one_for_all = dict.fromkeys(tuned, target / scenario.tuned_seconds)
    found = {
        "backlog seconds": (by_backlog(target), 1),
        "queue length": (by_length(one_for_all), 1),
        f"fixed, {scenario.fixed_pods} workers": (fixed(scenario.fixed_pods), scenario.fixed_pods),
    }
    if len(tuned) > 1:
        found["queue length, tuned for each model"] = (by_length(tuned), 1)
    return found


def table(scenarios: Sequence[Scenario] = SCENARIOS) -> Iterator[str]:
    cluster = Cluster()
    yield "| load | scaled by | drained after the spike | p95 wait | worker-hours |"
    yield "|---|---|---|---|---|"
    for scenario in scenarios:
        for name, (policy, pods) in policies(scenario, cluster).items():
            found = Simulation(scenario, policy, cluster, pods=pods).run()
            yield (
                f"| {scenario.name} | {name} | {found.drain_seconds:.0f} s | "
                f"{found.p95_wait_seconds:.0f} s | {found.worker_hours:.2f} |"
            )


if __name__ == "__main__":
    sys.stdout.write("\n".join(table()) + "\n")
