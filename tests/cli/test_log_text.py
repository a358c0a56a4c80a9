"""The log of `serve`, as it is by default."""

import re

import httpx2

from asyncinfer.testing import Running


def test_the_log_is_text_with_time_role_and_pid_and_no_requests_by_default(
    running: Running,
) -> None:
    assert httpx2.get(f"{running.url}/models").status_code == 200
    logged = re.findall(
        r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ (api|worker) (\d+) (\S+): ",
        running.log,
        re.MULTILINE,
    )
    pids = {role: pid for role, pid, _ in logged}
    assert pids.keys() == {"api", "worker"}
    assert pids["api"] != pids["worker"]
    assert "asyncinfer.access" not in {name for _, _, name in logged}
