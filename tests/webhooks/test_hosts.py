"""Which hosts have to wait: those in trouble, and those that are slow, so that others need not."""

from asyncinfer.repository.deliveries import DeliveryState, Member, Target
from asyncinfer.repository.outbox import Delivery
from asyncinfer.webhooks.hosts import FIRST_LIMIT, LAST_LIMIT, MAX_HOSTS, Held, Host, Hosts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def held(number: int) -> Held:
    member = Member(f"job{number}", 1, "completed")
    delivery = Delivery(
        "q", member, Target("https://a.example/", "t"), DeliveryState(), b"{}", None, 0, b""
    )
    return Held(delivery, None, 0.0)


def host_of(hosts: Hosts, name: str, waiting: int = 0) -> Host:
    host = hosts.of(name)
    assert host
    for number in range(waiting):
        hosts.add(host, held(number))
    return host


def test_a_host_in_trouble_gets_one_try_after_longer_and_longer_pauses() -> None:
    clock = Clock()
    hosts = Hosts(clock)
    host = host_of(hosts, "dead.example")
    for _ in range(2):
        hosts.note(host, is_failure=True, seconds=0.1)
        assert hosts.pause_seconds(host) == 0.0

    pauses = []
    for _ in range(8):
        hosts.note(host, is_failure=True, seconds=0.1)
        pauses.append(hosts.pause_seconds(host))
        clock.now += pauses[-1]
        assert hosts.pause_seconds(host) == 0.0
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]
    assert host.limit == 1

    hosts.note(host, is_failure=False, seconds=0.1)
    assert hosts.pause_seconds(host) == 0.0
    assert host.limit == 2


def test_a_closed_host_gives_up_all_that_waits_and_begins_no_try() -> None:
    hosts = Hosts(Clock())
    host = host_of(hosts, "dead.example", waiting=10)
    assert hosts.next_of(host)
    for _ in range(3):
        hosts.note(host, is_failure=True, seconds=0.1)
    assert hosts.next_of(host) is None
    assert len(hosts.surplus_of(host)) == 9
    assert hosts.surplus_of(host) == []


def test_a_host_that_answers_gets_more_tries_at_a_time_and_one_that_hangs_fewer() -> None:
    hosts = Hosts(Clock())
    host = host_of(hosts, "a.example", waiting=100)

    def starts() -> int:
        began = 0
        while hosts.next_of(host):
            began += 1
        return began

    assert starts() == FIRST_LIMIT
    for _ in range(30):
        hosts.note(host, is_failure=False, seconds=0.01)
    assert starts() == LAST_LIMIT - FIRST_LIMIT
    hosts.note(host, is_failure=True, seconds=15.0)
    while host.running:
        hosts.end(host)
    assert starts() == LAST_LIMIT // 2


def test_what_waits_for_a_host_is_bounded_by_its_speed() -> None:
    hosts = Hosts()
    slow, fast = host_of(hosts, "slow.example"), host_of(hosts, "fast.example")
    for _ in range(40):
        hosts.note(slow, is_failure=False, seconds=15.0)
        hosts.note(fast, is_failure=False, seconds=0.01)
    assert slow.room == LAST_LIMIT
    assert fast.room == 500
    slow.waiting.extend(map(held, range(20)))
    assert hosts.pause_seconds(slow) > 10
    assert hosts.pause_seconds(fast) == 0.0
    assert len(hosts.surplus_of(slow)) == 4
    fast.waiting.extend(map(held, range(500)))
    assert hosts.pause_seconds(fast) > 0


def test_hosts_that_have_not_answered_share_a_part_of_the_places() -> None:
    """One dead receiver may have many names."""
    hosts = Hosts(Clock())
    known = host_of(hosts, "known.example", waiting=1)
    assert hosts.next_of(known)
    hosts.note(known, is_failure=False, seconds=0.01)
    hosts.end(known)

    dead = [host_of(hosts, f"{number}.example") for number in range(100)]
    for host in dead:
        while hosts.pause_seconds(host) == 0.0:
            hosts.add(host, held(0))
    assert sum(len(host.waiting) for host in dead) == 250
    assert hosts.pause_seconds(known) == 0.0

    for host in dead:
        while hosts.next_of(host):
            hosts.end(host)
    assert hosts.all_waiting() == []
    assert all(hosts.pause_seconds(host) == 0.0 for host in dead)


def test_the_state_of_hosts_is_bounded_and_that_in_use_is_kept() -> None:
    hosts = Hosts()
    used = host_of(hosts, "used.example", waiting=1)
    for number in range(2 * MAX_HOSTS):
        host_of(hosts, f"{number}.example")
    assert len(hosts) == MAX_HOSTS
    assert hosts.of("used.example") is used

    all_busy = Hosts()
    for number in range(MAX_HOSTS):
        host_of(all_busy, f"{number}.example", waiting=1)
    assert all_busy.of("one-more.example") is None
