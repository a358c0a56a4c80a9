"""A file that took a process down while it was loaded is tried in a child by the next."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import ModelFile, scan
from asyncinfer.worker.models.crash_guard import CrashGuard
from tests import zoo
from tests.zoo.hostile import aborting_split

load = partial(Engine.load, intra_op_threads=1)

LOAD_SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from asyncinfer.models import folder
from asyncinfer.engine import Engine
from asyncinfer.worker.models.crash_guard import CrashGuard

(file,) = folder.scan(Path(sys.argv[1]))
load = partial(Engine.load, intra_op_threads=1)
CrashGuard(load, allow_custom_ops=False, folder=Path(sys.argv[2]))(file)
"""


def test_a_file_that_killed_its_process_is_refused_by_the_next(tmp_path: Path) -> None:
    zoo.place(tmp_path / "models", "bomb", aborting_split())
    (file,) = scan(tmp_path / "models")
    command = [sys.executable, "-c", LOAD_SCRIPT, str(tmp_path / "models"), str(tmp_path / "marks")]
    first = subprocess.run(command, capture_output=True, check=False)
    assert first.returncode < 0, "the file no longer kills its process"

    with pytest.raises(ModelRefused, match="SIGABRT"):
        CrashGuard(load, allow_custom_ops=False, folder=tmp_path / "marks")(file)


def test_a_machine_without_a_place_to_write_to_loads_all_the_same(tmp_path: Path) -> None:
    zoo.place(tmp_path, "m", zoo.mlp([2, 2]))
    no_byte = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    script = LOAD_SCRIPT.replace(", folder=Path(sys.argv[2])", "")
    assert script != LOAD_SCRIPT

    command = [sys.executable, "-B", "-c", no_byte + script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, check=False)

    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_file_that_loads_leaves_nothing_behind(tmp_path: Path) -> None:
    zoo.place(tmp_path / "models", "m", zoo.mlp([2, 2]))
    (file,) = scan(tmp_path / "models")

    engine = CrashGuard(load, allow_custom_ops=False, folder=tmp_path / "marks")(file)

    assert engine.signature.model == "m"
    assert list((tmp_path / "marks").iterdir()) == []


def test_a_file_that_another_process_is_loading_is_not_tried_in_a_child(tmp_path: Path) -> None:
    zoo.place(tmp_path / "models", "m", zoo.mlp([2, 2]))
    (file,) = scan(tmp_path / "models")
    marks = tmp_path / "marks"

    def load_while_another_does(file: ModelFile) -> Engine:
        (mark,) = marks.iterdir()
        mark.write_text(str(os.getppid()))
        return CrashGuard(load, allow_custom_ops=False, folder=marks)(file)

    assert CrashGuard(load_while_another_does, allow_custom_ops=False, folder=marks)(file).signature


EXIT_SCRIPT = """
import os, sys, threading
from pathlib import Path
from asyncinfer.models import folder
from asyncinfer.worker.models.crash_guard import CrashGuard

loading = threading.Event()

def load(file):
    loading.set()
    threading.Event().wait()

(file,) = folder.scan(Path(sys.argv[1]))
guard = CrashGuard(load, allow_custom_ops=False, folder=Path(sys.argv[2]))
threading.Thread(target=guard, args=(file,), daemon=True).start()
loading.wait()
assert os.listdir(sys.argv[2])
guard.prepare_exit()
os._exit(0)
"""


def test_a_process_that_ends_by_itself_while_it_loads_leaves_no_mark(tmp_path: Path) -> None:
    zoo.place(tmp_path / "models", "m", zoo.mlp([2, 2]))
    command = [sys.executable, "-c", EXIT_SCRIPT, str(tmp_path / "models"), str(tmp_path / "marks")]

    subprocess.run(command, check=True)

    assert list((tmp_path / "marks").iterdir()) == []
