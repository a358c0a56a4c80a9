"""What the processes of a service log while Redis is away, or refuses to take jobs."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from asyncinfer.client import Client
from tests.log_lines import parsed
from tests.ports import free_port
from tests.restricted_user import restricted_user

from .harness import eventually_sync
from .processes import DurableServer
from .services import open_services

IRIS = [[5.1, 3.5, 1.4, 0.2]]


def lines_by_process(log: str) -> dict[tuple[str, int], list[str]]:
    """The messages of each process, by its role and pid."""
    messages = defaultdict(list)
    for line in parsed(log):
        messages[line["role"], line["pid"]].append(line["message"])
    return messages


@pytest.mark.soak
def test_an_outage_of_redis_has_two_lines_in_each_process(
    durable: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    environ = {
        "REDIS_URL": durable.url,
        "MODEL_DIR": str(shipped_models),
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "debug",
        "CONCURRENCY": "2",
        "LEASE_SECONDS": "2",
        "REAP_SECONDS": "0.2",
    }
    with open_services(tmp_path, **environ) as services:
        services.work()
        url = services.serve("--api-processes", "2")
        with Client(url) as client:
            job = client.submit(IRIS, "iris")
            assert job.result()["class_name"] == "setosa"
            eventually_sync(lambda: "Serves digits, iris." in services.log, "the worker serves")
            # One API process is enough for `serve` to say that it is ready.
            eventually_sync(lambda: services.log.count("Connected to ") == 3, "all are connected")
            waits = client.submit(IRIS, "iris", delay_seconds=5)
            before = lines_by_process(services.log)
            durable.kill()

            def all_have(text: str) -> bool:
                now = lines_by_process(services.log)
                # The parent of the API processes does not ask Redis for anything.
                asking = [key for key in now if key[0] != "parent"]
                assert len(asking) == 3
                return all(
                    any(text in line for line in now[key][len(before[key]) :]) for key in asking
                )

            eventually_sync(lambda: all_have("Redis does not answer"), "all say that it is away")
            durable.start()
            eventually_sync(lambda: all_have("Redis answers again after"), "all say it is back")
            assert waits.result(timeout=30)["class_name"] == "setosa"
        log = services.log
    assert "Traceback" not in log
    for process, lines in lines_by_process(log).items():
        new = lines[len(before[process]) :]
        if process[0] == "parent":
            assert new == []
            continue
        assert len(new) == 2, (process, new)
        assert new[0].startswith("Redis does not answer (")
        assert re.fullmatch(r"Redis answers again after \d+\.\d s\.", new[1])


@pytest.mark.soak
def test_memory_that_is_full_takes_no_api_out_of_service_and_a_purge_through_it_makes_room(
    durable: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    environ = {
        "REDIS_URL": durable.url,
        "MODEL_DIR": str(shipped_models),
        "LOG_FORMAT": "json",
        "FAILED_TTL": "3600",
    }
    server: Any = redis.Redis.from_url(durable.url)
    with open_services(tmp_path, **environ) as services:
        services.work()
        urls = [services.serve(), services.serve()]
        clients = [Client(url, retries=0) for url in urls]
        try:
            kept = [clients[0].submit(1000 * IRIS, "iris") for _ in range(50)]
            for job in kept:
                job.wait()
            used = int(server.info("memory")["used_memory"])
            server.config_set("maxmemory", used - 1_000_000)
            for client in clients:
                eventually_sync(lambda c=client: not c.health().accepting, "it accepts no jobs")  # type: ignore[misc]
                reason = client.health().reason
                assert reason is not None
                assert reason.code == "storage_full"
                assert "nothing was taken in" in reason.message
            assert [status(url, "/health/ready") for url in urls] == [200, 200]
            assert [status(url, "/health/ready?for=submit") for url in urls] == [503, 503]

            while clients[0].purge(status="completed").purged:
                pass
            for client in clients:
                eventually_sync(lambda c=client: c.health().accepting, "it accepts jobs again")  # type: ignore[misc]
            assert [status(url, "/health/ready?for=submit") for url in urls] == [200, 200]
            assert clients[1].predict(IRIS, "iris")["class_name"] == "setosa"
        finally:
            for client in clients:
                client.close()
            server.close()

        def told() -> list[int]:
            processes = lines_by_process(services.log).values()
            return [sum("storage_full" in line for line in lines) for lines in processes]

        # A worker may not have met it.
        eventually_sync(
            lambda: {*told()} <= {0, 2} and sum(told()) >= 4, "each says that it began and ended"
        )


@pytest.mark.soak
def test_a_start_of_several_api_processes_on_a_full_redis_has_a_line_for_its_begin_and_its_end(
    durable: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    environ = {"REDIS_URL": durable.url, "MODEL_DIR": str(shipped_models), "LOG_FORMAT": "json"}
    server: Any = redis.Redis.from_url(durable.url)
    server.config_set("maxmemory", 1)

    def told(text: str) -> set[tuple[str, int]]:
        messages = lines_by_process(services.log).items()
        return {process for process, lines in messages if any(text in line for line in lines)}

    with open_services(tmp_path, **environ) as services:
        services.start("serve", "--work", "--api-processes", "2", "--port", str(free_port()))
        eventually_sync(lambda: len(told("storage_full: ")) >= 3, "API and worker say it", 30)
        server.config_set("maxmemory", 0)
        eventually_sync(
            lambda: told("storage_full: ") == told("Redis takes jobs again after"),
            "each says that it is over",
            30,
        )
    server.close()


@pytest.mark.soak
def test_a_right_that_is_taken_away_has_a_line_for_its_begin_and_its_end_also_in_a_worker(
    durable: DurableServer, shipped_models: Path, tmp_path: Path
) -> None:
    server: Any = redis.Redis.from_url(durable.url)
    with restricted_user(server, durable.url, "~*", "+@all") as url:
        environ = {"REDIS_URL": url, "MODEL_DIR": str(shipped_models), "LOG_FORMAT": "json"}
        with open_services(tmp_path, **environ) as services:
            services.work()
            services.serve()

            def roles_that_say(text: str) -> set[str]:
                messages = lines_by_process(services.log).items()
                return {
                    role for (role, _), lines in messages if any(text in line for line in lines)
                }

            for begin_or_end, change in (
                ("redis_permission_denied: The Redis user has no permission", "-@scripting"),
                ("Redis takes jobs again after", "+@scripting"),
            ):
                server.execute_command("ACL", "SETUSER", "restricted", change)
                eventually_sync(
                    lambda text=begin_or_end: roles_that_say(text) == {"api", "worker"},  # type: ignore[misc]
                    begin_or_end,
                )
    server.close()


def status(url: str, path: str) -> int:
    return httpx2.get(url + path, timeout=10).status_code
