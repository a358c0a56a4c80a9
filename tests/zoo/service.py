"""The commands `work` and `serve` as processes, on a model folder of a test."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import redis

from tests.faults.harness import assert_at_rest, eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY, python_process


@contextmanager
def running_service(redis_url: str, folder: Path, models: Collection[str]) -> Iterator[str]:
    """Starts a worker and an API that lists these models; gives the API's URL.

    Asserts at the end that the queues are at rest.
    """
    server = redis.Redis.from_url(redis_url)
    server.flushall()
    environ = {"REDIS_URL": redis_url, "MODEL_DIR": str(folder), "DEFAULT_MODEL": min(models)}
    with ExitStack() as stack:
        stack.enter_context(python_process("-m", "asyncinfer", "work", cwd=REPOSITORY, **environ))
        port = free_port()
        argv = ("-m", "asyncinfer", "serve", "--port", str(port))
        api = stack.enter_context(python_process(*argv, cwd=REPOSITORY, **environ))
        while not api.read_line().strip().startswith("Stop"):
            pass
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(verify=False) as client:
            eventually_sync(lambda: _listed(client, url) >= set(models), "all models are listed")
        yield url
    queues = [f"predict_queue:{name}" for name in models if name != min(models)]
    assert_at_rest(server, "predict_queue", *queues)
    server.close()


def _listed(client: httpx2.Client, url: str) -> set[str]:
    return {model["model"] for model in client.get(f"{url}/models").json()["models"]}
