"""What is known of each receiving host: which deliveries wait, and whether it is in trouble."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

from asyncinfer.repository.outbox import Delivery
from asyncinfer.webhooks.url_rules import Target

MAX_HOSTS: Final = 1000
FIRST_LIMIT: Final = 2
LAST_LIMIT: Final = 16
"""Tries to one host at a time, in one process: two at first, one more after each that is answered,
and half as many after each failure. So hosts that hang take few of the places for tries."""

DRAIN_SECONDS: Final = 5.0
"""How long what waits for a host may take, if its tries go on as they did."""
_MAX_WAITING: Final = 500
_MAX_UNKNOWN: Final = 250
"""Deliveries that wait or run, to all hosts that have not answered yet: many names that lead to one
dead receiver must not take all places."""
_FULL_PAUSE_SECONDS: Final = 0.5

_FAILURES: Final = 3
"""Failures in a row after which a host gets one try at a time, with pauses between."""
_FIRST_PAUSE_SECONDS: Final = 10.0
_LAST_PAUSE_SECONDS: Final = 300.0
_NEWEST: Final = 0.2
"""The weight of the last try in the average time of a try."""


class Held(Struct, frozen=True):
    """A delivery that this process has leased."""

    delivery: Delivery
    target: Target | None
    """None if its URL is refused."""
    taken_at: float
    """By `time.monotonic`, in seconds."""


class Host(Struct):
    """One receiving host, for one process."""

    waiting: deque[Held] = msgspec.field(default_factory=deque)
    running: int = 0
    limit: int = FIRST_LIMIT
    failures: int = 0
    """In a row."""
    closed_until: float = 0.0
    """Until when no try begins."""
    try_seconds: float = 1.0
    """The average time of a try."""
    is_known: bool = False
    """Whether it has answered in this process."""

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def room(self) -> int:
        """How many more deliveries may wait here, so that each gets its turn in time."""
        most = min(_MAX_WAITING, int(self.limit * DRAIN_SECONDS / self.try_seconds))
        return max(most, self.limit) - len(self.waiting)


class Hosts:
    """The hosts that this process sends to, the last used 1,000 of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._hosts: OrderedDict[str, Host] = OrderedDict()
        self._unknown = 0
        """Deliveries that wait or run, to hosts that are not known."""

    def __len__(self) -> int:
        return len(self._hosts)

    def of(self, name: str) -> Host | None:
        """What is known of a host; None if all 1,000 places have tries that wait or run."""
        if host := self._hosts.get(name):
            self._hosts.move_to_end(name)
            return host
        if len(self._hosts) >= MAX_HOSTS and not self._forget_one():
            return None
        return self._hosts.setdefault(name, Host())

    def _forget_one(self) -> bool:
        """Forgets the idle host that was not used for longest; returns whether there is one."""
        for name, host in self._hosts.items():
            if host.is_idle:
                del self._hosts[name]
                return True
        return False

    def pause_seconds(self, host: Host) -> float:
        """How long a delivery must be put off before it may wait for this host; 0: it may now. So
        what waits here is bounded, and deliveries to other hosts go past it."""
        closed_seconds = host.closed_until - self._clock()
        if closed_seconds > 0:
            return closed_seconds
        if host.room <= 0:
            return max(host.try_seconds, _FULL_PAUSE_SECONDS)
        is_crowded = not host.is_known and self._unknown >= _MAX_UNKNOWN
        return _FULL_PAUSE_SECONDS if is_crowded else 0.0

    def add(self, host: Host, held: Held) -> None:
        """Lets a delivery wait for its host, for which `pause_seconds` is 0."""
        host.waiting.append(held)
        self._unknown += not host.is_known

    def next_of(self, host: Host) -> Held | None:
        """Takes the delivery that is tried next, which counts as running; None if none waits, or
        none may be tried now."""
        is_closed = host.closed_until > self._clock()
        if is_closed or not host.waiting or host.running >= host.limit:
            return None
        host.running += 1
        return host.waiting.popleft()

    def surplus_of(self, host: Host) -> list[Held]:
        """Takes the deliveries that would wait too long: all of a closed host."""
        is_closed = host.closed_until > self._clock()
        return self._taken(host, len(host.waiting) if is_closed else max(0, -host.room))

    def all_waiting(self) -> list[Held]:
        """Takes all deliveries that wait, of all hosts."""
        hosts = self._hosts.values()
        return [held for host in hosts for held in self._taken(host, len(host.waiting))]

    def _taken(self, host: Host, count: int) -> list[Held]:
        self._unknown -= 0 if host.is_known else count
        return [host.waiting.pop() for _ in range(count)]

    def end(self, host: Host) -> None:
        """Call it when a delivery that was running is done with, whatever came of it."""
        host.running -= 1
        self._unknown -= not host.is_known

    def note(self, host: Host, *, is_failure: bool, seconds: float) -> None:
        """Notes the end of a try. A host in trouble is closed for 10 s to 5 min, longer each
        time."""
        host.try_seconds += _NEWEST * (max(seconds, 0.001) - host.try_seconds)
        if not is_failure:
            if not host.is_known:
                host.is_known = True
                self._unknown -= len(host.waiting) + host.running
            host.failures = 0
            host.closed_until = 0.0
            host.limit = min(host.limit + 1, LAST_LIMIT)
            return
        host.failures += 1
        host.limit = max(1, host.limit // 2)
        if (beyond := host.failures - _FAILURES) >= 0:
            host.limit = 1
            pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(beyond, 10), _LAST_PAUSE_SECONDS)
            host.closed_until = self._clock() + pause
