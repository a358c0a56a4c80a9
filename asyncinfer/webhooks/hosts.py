"""What is known of each receiving host, and which delivery is tried next."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Final, Literal

import msgspec
from msgspec import Struct

from asyncinfer.repository.outbox import Delivery
from asyncinfer.webhooks.answers import TRY_SECONDS, Answer
from asyncinfer.webhooks.url_rules import Target

MAX_HOSTS: Final = 1000
FIRST_LIMIT: Final = 2
MAX_LIMIT: Final = 16
"""Tries to one host at a time, in one process: two at first, one more after each that is answered,
and half as many after each failure."""

DRAIN_SECONDS: Final = 5.0
"""How long what waits for a host may take, if its tries go on as they did."""
OVERDUE_SECONDS: Final = 2.0
"""When a try that runs leaves its place to others, and its host counts as one that hangs if it used
to be quick."""
SHORT_TRY_SECONDS: Final = 5.0
"""The longest time of a try to a new host while others wait for its place."""
_SLOW_SECONDS: Final = 5.0
"""Hosts whose tries take longer on average are slow."""
_MAX_WAITING: Final = 500

_FULL_PAUSE_SECONDS: Final = 0.5
_NEW_PAUSE_SECONDS: Final = 5.0
_MAX_SLOW_PAUSE_SECONDS: Final = 60.0

_FAILURES: Final = 3
"""Failures in a row after which a host gets one try at a time, with pauses between."""
_FIRST_PAUSE_SECONDS: Final = 10.0
_MAX_PAUSE_SECONDS: Final = 300.0
_LAST_TRY_WEIGHT: Final = 0.2
"""In the average time of a try."""

Standing = Literal["proven", "new", "slow"]
"""Of a host: it has answered, and quickly; it has not answered yet; it hung the last time, or needs
long."""


class Held(Struct, frozen=True):
    """A delivery that this process has leased."""

    delivery: Delivery
    target: Target | None
    """None if its URL is refused."""
    taken_at: float
    """By `time.monotonic`, in seconds."""

    @property
    def tenant(self) -> str:
        return self.delivery.target.tenant

    @property
    def is_redelivered(self) -> bool:
        """Whether somebody asked for this try, and so wants it at once."""
        state = self.delivery.state
        return state.restarted_ms > 0 and state.tries == 0


class Host(Struct, eq=False):
    """One receiver of a tenant, for one process."""

    name: tuple[str, str, int]
    """Tenant, host and port."""
    waiting: deque[Held] = msgspec.field(default_factory=deque)
    running: int = 0
    limit: int = FIRST_LIMIT
    failures: int = 0
    """In a row."""
    closed_until: float = 0.0
    """Until when no try begins, but one that somebody asked for."""
    try_seconds: float = 1.0
    """The average time of a try."""
    is_known: bool = False
    """Whether it has answered in this process."""
    is_hanging: bool = False

    @property
    def tenant(self) -> str:
        return self.name[0]

    @property
    def standing(self) -> Standing:
        if self.is_hanging or self.try_seconds > _SLOW_SECONDS:
            return "slow"
        return "proven" if self.is_known else "new"

    @property
    def room(self) -> int:
        """How many more deliveries may wait here, so that each gets its turn in time, and those of
        a new host leave room to other ones."""
        if self.standing == "new":
            return 2 * self.limit - len(self.waiting)
        most = min(_MAX_WAITING, int(self.limit * DRAIN_SECONDS / self.try_seconds))
        return max(most, self.limit) - len(self.waiting)


class Trial(Struct, eq=False):
    """One try that runs."""

    host: Host
    held: Held
    share: "Share"
    """Whose place it takes."""
    is_short: bool
    """Whether it must end within SHORT_TRY_SECONDS."""


class Share:
    """A part of the places for tries, with the hosts whose deliveries wait for one. No tenant has
    all of it, so that the hosts of one never hold up those of another."""

    def __init__(
        self, places: int, tenant_places: int, max_waiting: int = 0, tenant_waiting: int = 0
    ) -> None:
        self.places = places
        self._tenant_places = tenant_places
        self._max_waiting = max_waiting
        self._tenant_waiting = tenant_waiting
        self.lines: dict[str, dict[tuple[str, str, int], Host]] = {}
        """By tenant, the hosts for which something waits."""
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    def free(self, tenant: str) -> int:
        """How many more tries of a tenant may begin now."""
        free_of_all = self.places - self._running.total()
        return min(free_of_all, self._tenant_places - self._running[tenant])

    def surplus(self, tenant: str) -> int:
        """How many deliveries of a tenant wait here beyond what may; negative if there is room."""
        surplus_of_all = self._waiting.total() - self._max_waiting
        return max(surplus_of_all, self._waiting[tenant] - self._tenant_waiting)

    def run(self, tenant: str, count: int = 1) -> None:
        _add(self._running, tenant, count)

    def wait(self, tenant: str, count: int) -> None:
        _add(self._waiting, tenant, count)

    def in_turn(self) -> list[str]:
        """The tenants for which something waits, those with the fewest tries first."""
        return sorted(self.lines, key=self._running.__getitem__)

    def join(self, host: Host) -> None:
        """Puts a host for which something waits at the end of its tenant's line."""
        self.lines.setdefault(host.tenant, {})[host.name] = host

    def leave(self, host: Host) -> None:
        """The tenant's line is the last one after this, among those with as many tries."""
        line = self.lines.pop(host.tenant, {})
        line.pop(host.name, None)
        if line:
            self.lines[host.tenant] = line


def _add(counter: Counter[str], tenant: str, count: int) -> None:
    counter[tenant] += count
    if not counter[tenant]:
        del counter[tenant]


class Hosts:
    """The hosts that this process sends to, the last used 1,000 of them, and the places for tries;
    each try has a connection."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._hosts: OrderedDict[tuple[str, str, int], Host] = OrderedDict()
        self._tenants: Counter[str] = Counter()
        # Their places and those of `_late` are 64, as many as `posting.py` has connections.
        self._shares: dict[Standing, Share] = {
            "proven": Share(24, 18, max_waiting=650, tenant_waiting=500),
            "new": Share(16, 12, max_waiting=200, tenant_waiting=20),
            "slow": Share(8, 6, max_waiting=40, tenant_waiting=2),
        }
        self._late = Share(16, 12)
        """Of tries to proven and new hosts that are overdue."""
        self._overdue: dict[int, Trial] = {}
        """Those that have no place there."""

    def __len__(self) -> int:
        return len(self._hosts)

    def of(self, tenant: str, target: Target) -> Host:
        """What is known of a host."""
        name = (tenant, target.host, target.port)
        if host := self._hosts.get(name):
            self._hosts.move_to_end(name)
            return host
        if len(self._hosts) >= MAX_HOSTS:
            self._forget_one()
        self._tenants[tenant] += 1
        return self._hosts.setdefault(name, Host(name))

    def _forget_one(self) -> None:
        """Forgets the idle host that was not used for longest, of the tenant with the most hosts.
        If all of that one are in use, there are too few places for all others to be."""
        ((largest, _),) = self._tenants.most_common(1)
        idle = [name for name, host in self._hosts.items() if not (host.waiting or host.running)]
        if idle:
            name = next((name for name in idle if name[0] == largest), idle[0])
            del self._hosts[name]
            _add(self._tenants, name[0], -1)

    # --- what waits --------------------------------------------------------------------------

    def pause_seconds(self, host: Host, *, is_redelivered: bool = False) -> float:
        """How long a delivery must be put off before it may wait for this host; 0: it may now. So
        what waits here is bounded, and deliveries to other hosts go past it."""
        closed_seconds = host.closed_until - self._clock()
        if closed_seconds > 0 and not is_redelivered:
            return closed_seconds
        if self._share_of(host).surplus(host.tenant) >= 0:
            return self._crowded_pause_seconds(host.standing)
        return max(host.try_seconds, _FULL_PAUSE_SECONDS) if host.room <= 0 else 0.0

    def _crowded_pause_seconds(self, standing: Standing) -> float:
        if standing != "slow":
            return _NEW_PAUSE_SECONDS if standing == "new" else _FULL_PAUSE_SECONDS
        slow = sum(host.standing == "slow" for host in self._hosts.values())
        return min(slow * TRY_SECONDS / self._shares["slow"].places, _MAX_SLOW_PAUSE_SECONDS)

    def add(self, host: Host, held: Held) -> None:
        """Lets a delivery wait for its host, for which `pause_seconds` is 0."""
        if held.is_redelivered:
            host.waiting.appendleft(held)
        else:
            host.waiting.append(held)
        share = self._share_of(host)
        share.wait(host.tenant, 1)
        share.join(host)

    def surplus_of(self, host: Host) -> list[Held]:
        """Takes the deliveries that would wait too long: all of a closed host, but those that are
        redelivered."""
        if self._is_closed(host):
            surplus = sum(not held.is_redelivered for held in host.waiting)
        else:
            surplus = max(0, -host.room, self._share_of(host).surplus(host.tenant))
        return self._taken(host, surplus)

    def all_waiting(self) -> list[Held]:
        """Takes all deliveries that wait, of all hosts."""
        hosts = list(self._hosts.values())
        return [held for host in hosts for held in self._taken(host, len(host.waiting))]

    def _taken(self, host: Host, count: int) -> list[Held]:
        """Takes so many deliveries, those that came last first."""
        taken = [host.waiting.pop() for _ in range(min(count, len(host.waiting)))]
        self._left(host, len(taken))
        return taken

    def _left(self, host: Host, count: int) -> None:
        """Call it when deliveries do not wait any more."""
        share = self._share_of(host)
        share.wait(host.tenant, -count)
        if not host.waiting:
            share.leave(host)

    def _share_of(self, host: Host) -> Share:
        return self._shares[host.standing]

    def _is_closed(self, host: Host) -> bool:
        return host.closed_until > self._clock()

    # --- what is tried -----------------------------------------------------------------------

    def next(self) -> Trial | None:
        """Takes the delivery that is tried next, which counts as running; None if none waits, or
        none may be tried now. Tenants have their turn, and so have the hosts of each."""
        for share in self._shares.values():
            for tenant in share.in_turn():
                if share.free(tenant) <= 0:
                    continue
                for host in share.lines[tenant].values():
                    if self._may_begin(host):
                        return self._begin(share, host)
        return None

    def _may_begin(self, host: Host) -> bool:
        is_open = host.waiting[0].is_redelivered or not self._is_closed(host)
        return is_open and host.running < (1 if host.is_hanging else host.limit)

    def _begin(self, share: Share, host: Host) -> Trial:
        held = host.waiting.popleft()
        self._left(host, 1)
        if host.waiting:
            share.leave(host)
            share.join(host)
        others = sum(map(len, share.lines.values())) - bool(host.waiting)
        is_short = host.standing == "new" and others >= share.free(host.tenant)
        share.run(host.tenant)
        host.running += 1
        return Trial(host, held, share, is_short)

    def is_overdue(self, trial: Trial) -> None:
        """Call it when a try has run for OVERDUE_SECONDS: it leaves its place to others, if there
        are not too many such tries."""
        if trial.host.try_seconds <= OVERDUE_SECONDS / 2:
            self._set(trial.host, is_hanging=True)
        if trial.share is not self._shares["slow"]:
            self._overdue[id(trial)] = trial
            self._move_overdue()

    def _move_overdue(self) -> None:
        for trial in list(self._overdue.values()):
            if self._late.free(trial.host.tenant) > 0:
                del self._overdue[id(trial)]
                trial.share.run(trial.host.tenant, -1)
                trial.share = self._late
                self._late.run(trial.host.tenant)

    def end(self, trial: Trial) -> None:
        """Call it when a delivery that was running is done with, whatever came of it."""
        self._overdue.pop(id(trial), None)
        trial.share.run(trial.host.tenant, -1)
        trial.host.running -= 1
        self._move_overdue()

    def note(self, host: Host, answer: Answer) -> None:
        """Notes the end of a try. A host in trouble is closed for 10 s to 5 min, longer each
        time."""
        if not (answer.status or answer.blames_host):
            return  # nothing was sent
        seconds = answer.duration_ms / 1000
        hung = answer.failure == "timeout" or (not answer.status and seconds >= OVERDUE_SECONDS)
        change_seconds = max(seconds, 0.001) - host.try_seconds
        average_seconds = host.try_seconds + _LAST_TRY_WEIGHT * change_seconds
        is_known = host.is_known or not answer.blames_host
        self._set(host, is_hanging=hung, try_seconds=average_seconds, is_known=is_known)
        if not answer.blames_host:
            host.failures = 0
            host.closed_until = 0.0
            host.limit = min(host.limit + 1, MAX_LIMIT)
            return
        host.failures += 1
        host.limit = max(1, host.limit // 2)
        if (beyond := host.failures - _FAILURES) >= 0:
            host.limit = 1
            pause_seconds = min(_FIRST_PAUSE_SECONDS * 2 ** min(beyond, 10), _MAX_PAUSE_SECONDS)
            host.closed_until = self._clock() + pause_seconds

    def _set(
        self,
        host: Host,
        *,
        is_hanging: bool,
        try_seconds: float | None = None,
        is_known: bool | None = None,
    ) -> None:
        """Changes what a host's standing follows from: what waits for it goes to another share."""
        before = self._share_of(host)
        host.is_hanging = is_hanging
        host.try_seconds = host.try_seconds if try_seconds is None else try_seconds
        host.is_known = host.is_known if is_known is None else is_known
        after = self._share_of(host)
        if after is not before and host.waiting:
            before.wait(host.tenant, -len(host.waiting))
            before.leave(host)
            after.wait(host.tenant, len(host.waiting))
            after.join(host)
