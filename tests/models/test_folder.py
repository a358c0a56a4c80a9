"""Model folders with mistakes: each problem is named with its remedy, and stops nothing else."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncinfer.models.folder import default_model, read_folder, read_stamp, scan
from tests import unprivileged

Place = Callable[[Path], object]


def touch(*names: str) -> Place:
    def place(folder: Path) -> None:
        for name in names:
            path = folder / os.fsdecode(name.encode("latin-1"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return place


def link(name: str, target: str) -> Place:
    def place(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)

    return place


def fifo(name: str) -> Place:
    def place(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return place


def listening(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        # By a relative path: an absolute one may be longer than a socket's address may be.
        before = Path.cwd()
        os.chdir(folder)
        try:
            listener.bind("s.onnx")
        finally:
            os.chdir(before)


def folder_named(name: str) -> Place:
    return lambda folder: (folder / name).mkdir(parents=True)


def locked(name: str, mode: int = 0) -> Place:
    def place(folder: Path) -> None:
        (folder / name).chmod(mode)

    return place


def then(*places: Place) -> Place:
    def place_all(folder: Path) -> None:
        for place in places:
            place(folder)

    return place_all


def problems_in(folder: Path) -> dict[tuple[str, str], str]:
    """The problems by model and version."""
    files = scan(folder)
    return {(file.model, file.version): file.problem for file in files if file.problem}


@pytest.mark.parametrize(
    ("place", "label", "problem"),
    [
        (
            touch("m/1/b.onnx", "m/1/a.ONNX"),
            ("m", "1"),
            "m/1: has several ONNX files, and none is model.onnx: a.ONNX, b.onnx; "
            "give that name to the one to serve",
        ),
        (
            touch("m/1/onnx/model.onnx"),
            ("m", "1"),
            "m/1/onnx/model.onnx: lies a folder too deep; move it to m/1/model.onnx",
        ),
        (folder_named("m/1/model.onnx"), ("m", "1"), "m/1/model.onnx: is a folder, not a file"),
        (folder_named("m.onnx"), ("m.onnx", ""), "m.onnx: is a folder, not a file"),
        (
            touch("models/m/1/model.onnx"),
            ("models", ""),
            "models/m: lies a folder too deep; move it up, or set MODEL_DIR to models",
        ),
        (touch("m/x.onnx"), ("m", "1"), "m/x.onnx: has no version folder: move it to m/1/model"),
        (touch("m/old/x.onnx"), ("m", "old"), "m/old: is not a version: rename old to a whole num"),
        (link("m.onnx", "gone"), ("m", "1"), "m.onnx: is a link that leads to no file; repair"),
        (link("m.onnx", "m.onnx"), ("m", "1"), "m.onnx: is a link that leads to no file"),
        (link("m/1/model.onnx", "x"), ("m", "1"), "m/1/model.onnx: is a link that leads to no"),
        (link("m/1", "gone"), ("m", "1"), "m/1: is a link that leads to no file"),
        (link("m", "gone"), ("m", ""), "m: is a link that leads to no file"),
        (fifo("m.onnx"), ("m", "1"), "m.onnx: is a FIFO, not a file"),
        (fifo("m/1/model.onnx"), ("m", "1"), "m/1/model.onnx: is a FIFO, not a file"),
        (listening, ("s", "1"), "s.onnx: is a socket, not a file"),
        (link("m.onnx", "/dev/zero"), ("m", "1"), "m.onnx: is a device, not a file"),
        (
            touch("my model.onnx"),
            ("my model", "1"),
            "my model.onnx: cannot have this name; rename it: a model's name is",
        ),
        (touch("a\nb.onnx"), (r"a\nb", "1"), r"a\nb.onnx: cannot have this name; rename it: "),
        (touch("\xff.onnx"), (r"\xff", "1"), r"\xff.onnx: cannot have this name; rename it: "),
        (touch("m/1/\xff.onnx"), ("m", "1"), r"m/1/\xff.onnx: rename it to model.onnx"),
        (
            touch(f"{'x' * 200}.onnx"),
            (f"{'x' * 80}…", "1"),
            f"{'x' * 80}…: cannot have this name; rename it: ",
        ),
        (
            touch("m/2/model.onnx", "m.onnx"),
            ("m", ""),
            "m.onnx: is not served, since m/2/model.onnx has its name; rename or remove one",
        ),
        (
            touch("m.onnx", "m.ONNX"),
            ("m", ""),
            "m.ONNX: is not served, since m.onnx has its name; rename or remove one",
        ),
        (
            then(touch("m/1/model.onnx"), folder_named("m/model.toml")),
            ("m", "1"),
            "m/model.toml: is a folder, not a file",
        ),
        (
            then(touch("m/1/model.onnx"), fifo("m/model.toml")),
            ("m", "1"),
            "m/model.toml: is a FIFO, not a file",
        ),
    ],
)
def test_a_file_that_cannot_be_served_is_named_with_its_remedy(
    tmp_path: Path, place: Place, label: tuple[str, str], problem: str
) -> None:
    touch("good/1/model.onnx")(tmp_path)
    place(tmp_path)

    found = problems_in(tmp_path)

    assert found.keys() == {label}
    assert found[label].startswith(problem)


@pytest.mark.parametrize(
    ("path", "mode", "label", "problem"),
    [
        ("m.onnx", 0, ("m", "1"), "m.onnx: cannot be read: Permission denied; give "),
        ("m/1/model.onnx", 0, ("m", "1"), "m/1/model.onnx: cannot be read: Permission denied"),
        ("m/1", 0, ("m", "1"), "m/1: cannot be read: Permission denied"),
        ("m/1", 0o400, ("m", "1"), "m/1: cannot be read: Permission denied"),
        ("m", 0, ("m", ""), "m: cannot be read: Permission denied; give "),
        ("m", 0o400, ("m", ""), "m: cannot be read: Permission denied"),
        ("m/model.toml", 0, ("m", "1"), "m/model.toml: cannot be read: Permission denied"),
    ],
)
def test_an_unreadable_file_is_named_with_the_command_that_makes_it_readable(
    tmp_path: Path, path: str, mode: int, label: tuple[str, str], problem: str
) -> None:
    unprivileged.skip_unless_possible()
    names = ["m.onnx"] if path == "m.onnx" else ["m/1/model.onnx", "m/model.toml"]
    touch("good/1/model.onnx", *names)(tmp_path)
    before = (tmp_path / path).stat().st_mode
    locked(path, mode)(tmp_path)

    with unprivileged.unprivileged():
        found = problems_in(tmp_path)

    (tmp_path / path).chmod(before)
    assert found.keys() == {label}
    assert found[label].startswith(problem)
    assert "chmod" in found[label]
    assert problems_in(tmp_path) == {}


def test_an_unreadable_folder_that_cannot_be_a_model_is_ignored(tmp_path: Path) -> None:
    unprivileged.skip_unless_possible()
    then(touch("good.onnx"), folder_named("lost+found"), locked("lost+found"))(tmp_path)

    with unprivileged.unprivileged():
        found = read_folder(tmp_path)

    (tmp_path / "lost+found").chmod(0o700)
    assert [file.display_path for file in found.files] == ["good.onnx"]
    (line,) = found.ignored
    assert line.startswith("lost+found is ignored: it cannot be read: Permission denied")
    assert read_folder(tmp_path).ignored == ()


def test_files_that_are_no_models_have_no_problem(tmp_path: Path) -> None:
    files = ["Thumbs.db", "desktop.ini", ".DS_Store", "._m.onnx", "README.md", "labels.txt"]
    places = ["", "m/", "m/1/", "__pycache__/", ".git/", "@eaDir/", "System Volume Information/"]
    touch("m/1/model.onnx", *(f"{place}{file}" for place in places for file in files))(tmp_path)

    assert [(file.display_path, file.problem) for file in scan(tmp_path)] == [
        ("m/1/model.onnx", "")
    ]


@pytest.mark.parametrize("name", ["churn.onnx", "MODEL.ONNX", "with space.onnx", "é.onnx"])
def test_the_only_onnx_file_of_a_version_is_served_whatever_its_name(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "churn" / "1").mkdir(parents=True)
    (tmp_path / "churn" / "1" / name).touch()

    (file,) = scan(tmp_path)

    assert (file.model, file.version, file.path.name, file.problem) == ("churn", "1", name, "")
    assert [name for name, _, _ in read_stamp(file)] == [name]


def test_a_single_file_in_capitals_is_served_under_its_stem(tmp_path: Path) -> None:
    touch("UPPER.ONNX")(tmp_path)

    (file,) = scan(tmp_path)

    assert (file.model, file.version, file.problem) == ("UPPER", "1", "")


def test_other_files_beside_a_model_do_not_hide_a_change(tmp_path: Path) -> None:
    touch("m/1/model.onnx", "m/1/weights.bin")(tmp_path)
    then(link("m/1/gone", "nowhere"), link("m/1/loop", "loop"), fifo("m/1/pipe"))(tmp_path)
    (file,) = scan(tmp_path)

    before = read_stamp(file)
    (tmp_path / "m/1/weights.bin").write_bytes(b"other")

    assert [name for name, _, _ in before] == ["model.onnx", "weights.bin"]
    assert read_stamp(file) != before


def test_invalid_names_leave_the_only_model_the_default() -> None:
    assert default_model(None, ["churn", "my model", "a+b"]) == "churn"
