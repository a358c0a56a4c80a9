"""A child never outlives its parent, and gets the terminal's signals only from its parent."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Final

import pytest

from asyncinfer.processes import child_process
from asyncinfer.processes.child_process import Child, Tie
from tests.faults.harness import eventually, eventually_sync
from tests.process import ProcessInfo, is_gone, python_process, running_processes

TIES: Final = ("kernel", "watchdog") if sys.platform == "linux" else ("watchdog",)

FOREVER: Final = (sys.executable, "-c", "import signal; signal.pause()")

STUBBORN: Final = (
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
    "signal.pause()",
)

PARENT: Final = """
import asyncio, signal, sys
from asyncinfer.processes import child_process

async def main(tie, death_signal, *argv):
    child = child_process.spawn(argv, death_signal=signal.Signals[death_signal], tie=tie)
    print(child.pid, flush=True)
    await child.wait()
    print("ended", flush=True)
    await asyncio.Event().wait()

signal.signal(signal.SIGINT, signal.SIG_IGN)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(params=TIES)
def tie(request: pytest.FixtureRequest) -> Tie:
    chosen: Tie = request.param
    return chosen


def spawn(tie: Tie, argv: tuple[str, ...] = FOREVER, output: Path | None = None) -> Child:
    if output is None:
        return child_process.spawn(argv, death_signal=signal.SIGTERM, tie=tie)
    with output.open("wb") as file:
        return child_process.spawn(argv, death_signal=signal.SIGTERM, tie=tie, output=file)


@pytest.mark.parametrize("death_signal", ["SIGTERM", "SIGKILL"])
def test_the_child_of_a_killed_parent_ends(tie: Tie, death_signal: str) -> None:
    with python_process("-c", PARENT, tie, death_signal, *FOREVER) as process:
        pid = int(process.read_line())
        process.kill()

        eventually_sync(lambda: is_gone(pid), "the child has ended", seconds=5)


def test_a_child_that_ignores_sigterm_is_killed_with_its_parent(tie: Tie) -> None:
    with python_process("-c", PARENT, tie, "SIGKILL", *STUBBORN) as process:
        # The parent's line and the empty one of the child may come in any order.
        empty, pid_text = sorted([process.read_line(), process.read_line()])
        pid = int(pid_text)
        assert empty == ""
        process.kill()

        eventually_sync(lambda: is_gone(pid), "the child has ended", seconds=5)


def test_ctrl_c_in_the_parents_terminal_does_not_reach_the_child(tie: Tie) -> None:
    echo = "import sys, signal; signal.sigwait([signal.SIGUSR1]); print('alive', flush=True)"
    # The parent ignores SIGINT, and the child would inherit that.
    ready = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); "
    )
    argv = (sys.executable, "-c", f"{ready} print('ready', flush=True); {echo}")
    with python_process("-c", PARENT, tie, "SIGKILL", *argv) as process:
        # The parent's line and the child's may come in any order.
        pid_text, ready_text = sorted([process.read_line(), process.read_line()])
        pid = int(pid_text)
        assert ready_text == "ready"
        process.signal_group(signal.SIGINT)
        os.kill(pid, signal.SIGUSR1)

        assert process.read_line() == "alive"
        assert process.read_line() == "ended"


async def test_the_exit_code_of_a_child_is_returned(tie: Tie) -> None:
    child = spawn(tie, (sys.executable, "-c", "raise SystemExit(7)"))

    assert await child.wait() == 7
    assert not child.is_alive


async def test_nothing_is_left_of_a_child_that_has_ended(tie: Tie) -> None:
    child = spawn(tie, ("true",))
    await child.wait()

    await eventually(lambda: not group_of(child), "its watchdog has ended too")


def group_of(child: Child) -> list[ProcessInfo]:
    return [process for process in running_processes() if process.group_id == child.pid]


async def test_the_signal_that_ended_a_child_is_returned(tie: Tie) -> None:
    child = spawn(tie)
    child.signal(signal.SIGKILL)

    assert await child.wait() == -signal.SIGKILL


async def test_a_child_ends_on_sigterm(tie: Tie) -> None:
    assert await spawn(tie).stop(grace_seconds=5) == -signal.SIGTERM


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(
    tie: Tie, tmp_path: Path
) -> None:
    child = spawn(tie, STUBBORN, tmp_path / "out")
    await eventually(lambda: bool((tmp_path / "out").read_text()), "it ignores SIGTERM")

    assert await child.stop(grace_seconds=0.05) == -signal.SIGKILL


async def test_stopping_a_child_that_has_ended_is_no_error(tie: Tie) -> None:
    child = spawn(tie, ("true",))
    await child.wait()

    assert await child.stop(grace_seconds=1) == 0


async def test_arguments_and_output_reach_it_as_they_are(tie: Tie, tmp_path: Path) -> None:
    unusual = "a b'\"$c;\n*"
    script = "import sys; print(sys.argv[1], sys.stdin.read())"
    child = spawn(tie, (sys.executable, "-c", script, unusual), tmp_path / "out")

    assert await child.wait() == 0
    assert (tmp_path / "out").read_text() == f"{unusual} \n"


async def test_a_missing_command_raises_an_error(tie: Tie, tmp_path: Path) -> None:
    try:
        code = await spawn(tie, ("there-is-no-such-command",), tmp_path / "out").wait()
    except FileNotFoundError:
        code = 127  # as a shell says it

    assert code == 127


async def test_a_child_spawned_outside_the_main_thread_is_refused() -> None:
    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(spawn, child_process.DEFAULT_TIE)
