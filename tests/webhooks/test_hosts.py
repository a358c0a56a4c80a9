"""Which delivery is tried next: those to hosts in trouble and to slow ones wait, others not."""

from asyncinfer.repository.deliveries import DeliveryState, Member, Target
from asyncinfer.repository.outbox import Delivery
from asyncinfer.webhooks.answers import Answer
from asyncinfer.webhooks.hosts import FIRST_LIMIT, MAX_HOSTS, MAX_LIMIT, Held, Host, Hosts, Trial
from asyncinfer.webhooks.url_rules import Target as Receiver

TIME_OUT = Answer(0, "timeout", 15_000)
REFUSED = Answer(0, "connection_failed", 100)
UNTRIED = DeliveryState()
REDELIVERED = DeliveryState(restarted_ms=1)
MOST_SECONDS = 60.0
"""The longest pause of a delivery for whose host there is no room."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def good(seconds: float = 0.01) -> Answer:
    return Answer(204, "", round(1000 * seconds))


def held(number: int = 0, tenant: str = "t", state: DeliveryState = UNTRIED) -> Held:
    member = Member(f"job{number}", 1, "completed")
    target = Target("https://a.example/", tenant)
    return Held(Delivery("q", member, target, state, b"{}", None, 0, b""), None, 0.0)


def host_of(
    hosts: Hosts, name: str, waiting: int = 0, *, tenant: str = "t", port: int = 443
) -> Host:
    host = hosts.of(tenant, Receiver("https", name, port, "/"))
    for number in range(waiting):
        hosts.add(host, held(number, tenant))
    return host


def fill(hosts: Hosts, host: Host) -> int:
    """Lets deliveries wait for a host while there is room; returns how many."""
    before = len(host.waiting)
    while hosts.pause_seconds(host) == 0.0:
        hosts.add(host, held(tenant=host.tenant))
    return len(host.waiting) - before


def begin(hosts: Hosts) -> list[Trial]:
    """Begins all tries that may run now."""
    began = []
    while trial := hosts.next():
        began.append(trial)
    return began


def prove(hosts: Hosts, *names: str, tenant: str = "t") -> list[Host]:
    found = [host_of(hosts, name, tenant=tenant) for name in names]
    for host in found:
        hosts.note(host, good())
    return found


def test_a_host_in_trouble_gets_one_try_after_longer_and_longer_pauses() -> None:
    clock = Clock()
    hosts = Hosts(clock)
    host = host_of(hosts, "dead.example")
    for _ in range(2):
        hosts.note(host, REFUSED)
        assert hosts.pause_seconds(host) == 0.0

    pauses = []
    for _ in range(8):
        hosts.note(host, REFUSED)
        pauses.append(hosts.pause_seconds(host))
        clock.now += pauses[-1]
        assert hosts.pause_seconds(host) == 0.0
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]
    assert host.limit == 1

    hosts.note(host, good())
    assert hosts.pause_seconds(host) == 0.0
    assert host.limit == 2


def test_a_closed_host_gives_up_all_that_waits_and_begins_no_try() -> None:
    hosts = Hosts(Clock())
    host = host_of(hosts, "dead.example", waiting=10)
    assert hosts.next()
    for _ in range(3):
        hosts.note(host, REFUSED)
    assert hosts.next() is None
    assert len(hosts.surplus_of(host)) == 9
    assert hosts.surplus_of(host) == []


def test_a_redelivery_is_tried_at_once_though_its_host_is_closed() -> None:
    hosts = Hosts(Clock())
    (host,) = prove(hosts, "dead.example")
    hosts.add(host, held())
    for _ in range(5):
        hosts.note(host, REFUSED)
    assert hosts.pause_seconds(host) > 0.0
    for number in range(3):
        assert hosts.pause_seconds(host, is_redelivered=True) == 0.0
        hosts.add(host, held(number, state=REDELIVERED))
    (trial,) = begin(hosts)
    assert trial.held.is_redelivered
    assert len(hosts.surplus_of(host)) == 1
    hosts.end(trial)
    assert len(begin(hosts)) == 1
    after_a_try = DeliveryState(restarted_ms=1, tries=1)
    assert not held(state=after_a_try).is_redelivered


def test_a_dead_port_holds_up_no_other_port_of_its_host() -> None:
    hosts = Hosts(Clock())
    dead, alive = (host_of(hosts, "a.example", port=port) for port in (443, 8443))
    for _ in range(3):
        hosts.note(dead, REFUSED)
    assert hosts.pause_seconds(dead) > 0.0
    assert hosts.pause_seconds(alive) == 0.0


def test_a_host_that_answers_gets_more_tries_at_a_time_and_one_that_fails_fewer() -> None:
    hosts = Hosts(Clock())
    host = host_of(hosts, "a.example", waiting=10)
    trials = begin(hosts)
    assert len(trials) == FIRST_LIMIT
    for _ in range(30):
        hosts.note(host, good())
    host_of(hosts, "a.example", waiting=90)
    trials += begin(hosts)
    assert len(trials) == MAX_LIMIT
    hosts.note(host, Answer(500, "", 10))
    for trial in trials:
        hosts.end(trial)
    assert len(begin(hosts)) == MAX_LIMIT // 2


def test_what_waits_for_a_host_is_bounded_by_its_speed() -> None:
    hosts = Hosts()
    slow, fast = host_of(hosts, "slow.example"), host_of(hosts, "fast.example")
    for _ in range(40):
        hosts.note(slow, good(4.0))
        hosts.note(fast, good(0.01))
    assert slow.room == MAX_LIMIT * 5 // 4
    assert fast.room == 500
    assert fill(hosts, slow) == slow.limit * 5 // 4
    assert hosts.pause_seconds(slow) > 3
    assert hosts.pause_seconds(fast) == 0.0
    fill(hosts, fast)
    assert hosts.pause_seconds(fast) > 0


def test_hosts_that_hang_take_few_places_and_one_try_each() -> None:
    hosts = Hosts(Clock())
    (proven,) = prove(hosts, "proven.example")
    hanging = [host_of(hosts, f"{number}.example") for number in range(100)]
    for host in hanging:
        hosts.note(host, TIME_OUT)
    seen = 0
    for _ in range(10):
        waiting = sum(fill(hosts, host) for host in hanging)
        assert waiting <= 2
        seen += len(begin(hosts))
    assert 0 < seen <= 8
    assert max(host.running for host in hanging) == 1
    assert 2.0 < hosts.pause_seconds(hanging[-1]) <= MOST_SECONDS
    fill(hosts, proven)
    assert {trial.host for trial in begin(hosts)} == {proven}


def test_a_host_that_answers_again_leaves_those_that_hang() -> None:
    hosts = Hosts(Clock())
    (host,) = prove(hosts, "a.example")
    standings = []
    for answer in (TIME_OUT, good()):
        hosts.note(host, answer)
        standings.append(host.standing)
    assert standings == ["slow", "proven"]


def test_hosts_that_begin_to_hang_leave_their_places_to_others() -> None:
    """Each is known as one that answers; a try of theirs that is overdue takes a place for such."""
    hosts = Hosts(Clock())
    names = [f"{number}.example" for number in range(12)]
    for host in prove(hosts, *names):
        hosts.add(host, held())
        hosts.add(host, held())
    trials = begin(hosts)
    assert len(trials) == 18  # a tenant has not all places
    for trial in trials:
        hosts.is_overdue(trial)
        hosts.surplus_of(trial.host)
    (proven,) = prove(hosts, "proven.example")
    assert fill(hosts, proven) > 0
    assert {trial.host for trial in begin(hosts)} == {proven}
    for trial in trials:
        hosts.note(trial.host, TIME_OUT)
        hosts.end(trial)
    assert {host.standing for host in prove(hosts, *names)} == {"proven"}


def test_the_hosts_of_one_tenant_leave_places_of_each_kind_to_others() -> None:
    hosts = Hosts(Clock())
    for tenant in ("many", "few"):
        for number in range(50):
            proven = host_of(hosts, f"proven-{number}.example", tenant=tenant)
            hosts.note(proven, good())
            slow = host_of(hosts, f"slow-{number}.example", tenant=tenant)
            hosts.note(slow, TIME_OUT)

    for _ in range(20):
        for kind in ("proven", "slow", "new"):
            for number in range(50):
                fill(hosts, host_of(hosts, f"{kind}-{number}.example", tenant="many"))
        for trial in begin(hosts):
            hosts.is_overdue(trial)
            hosts.surplus_of(trial.host)
    for kind in ("proven", "slow", "new"):
        host = host_of(hosts, f"{kind}-7.example", tenant="few")
        assert hosts.pause_seconds(host) == 0.0
        hosts.add(host, held(tenant="few"))
    assert [trial.host.tenant for trial in begin(hosts)] == ["few"] * 3


def test_where_tenants_take_all_places_the_next_one_is_for_who_has_none() -> None:
    hosts = Hosts(Clock())
    for number in range(50):
        for tenant in ("many", "more", "most"):
            fill(hosts, host_of(hosts, f"{number}.example", tenant=tenant))
    trials = begin(hosts)
    assert len(trials) == 16
    host = host_of(hosts, "a.example", tenant="few")
    assert hosts.pause_seconds(host) == 0.0
    hosts.add(host, held(tenant="few"))
    assert hosts.next() is None
    hosts.end(trials[0])
    (following,) = begin(hosts)
    assert following.host is host


def test_the_hosts_of_a_tenant_have_their_turn() -> None:
    hosts = Hosts(Clock())
    names = [f"{number}.example" for number in range(20)]
    first, *_, last = prove(hosts, *names)
    fill(hosts, first)
    hosts.add(last, held())
    assert last in [trial.host for trial in begin(hosts)[:2]]


def test_a_try_to_a_new_host_is_short_while_others_wait() -> None:
    hosts = Hosts(Clock())
    first = host_of(hosts, "0.example", waiting=5)
    trials = begin(hosts)
    assert [trial.is_short for trial in trials] == [False] * FIRST_LIMIT
    assert len(first.waiting) == 3
    for number in range(1, 15):
        host_of(hosts, f"{number}.example", waiting=1)
    assert begin(hosts)[0].is_short


def test_places_come_back_when_tries_end() -> None:
    hosts = Hosts(Clock())
    for turn in range(50):
        for number in range(30):
            host = host_of(hosts, f"{number}.example", tenant=f"t{number % 3}")
            host.closed_until = 0.0
            fill(hosts, host)
        for trial in begin(hosts):
            hosts.is_overdue(trial)
            hosts.note(trial.host, good() if turn % 2 else TIME_OUT)
            hosts.surplus_of(trial.host)
            hosts.end(trial)
    hosts.all_waiting()
    for tenant in ("t1", "t2"):
        for host in prove(hosts, *map(str, range(20)), tenant=tenant):
            hosts.add(host, held(tenant=tenant))
    for number in range(20):
        host_of(hosts, f"new-{number}.example", waiting=1, tenant=f"t{number % 2}")
    assert len(begin(hosts)) == 24 + 16


def test_the_state_of_hosts_is_bounded_and_that_in_use_is_kept() -> None:
    hosts = Hosts()
    used = host_of(hosts, "used.example", waiting=1)
    (other,) = prove(hosts, "used.example", tenant="other")
    for number in range(2 * MAX_HOSTS):
        host_of(hosts, f"{number}.example")
    assert len(hosts) == MAX_HOSTS
    assert host_of(hosts, "used.example") is used
    assert host_of(hosts, "used.example", tenant="other") is other
