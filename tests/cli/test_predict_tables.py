"""What `predict` reads of a table: its separator, header and columns; what it says of bad ones."""

from pathlib import Path

import numpy as np
import pytest

from tests.cli.command_line import error_line, run_command, run_in_shell

ROW = "5.1,3.5,1.4,0.2\n"
CLASSES = ["setosa", "virginica"]
NUMBERS = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]


def lines(separator: str, *, header: bool = False) -> str:
    """Both rows in CSV."""
    start = f"{separator.join('abcd')}\n" if header else ""
    return start + "".join(f"{separator.join(map(str, row))}\n" for row in NUMBERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


def problems(path: Path, text: str, *options: str) -> list[str]:
    """The lines on stderr of a `predict` of a file with this text."""
    path.write_text(text)
    return run_command("predict", str(path), *options).err.splitlines()


# --- the separator ---------------------------------------------------------------------------


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_semicolon_or_a_tab_in_the_first_line_is_the_separator(
    url: str, path: Path, separator: str, header: bool
) -> None:
    path.write_text(lines(separator, header=header))
    ran = run_command("predict", str(path))
    assert (ran.code, ran.err) == (0, "")
    assert [row["class_name"] for row in ran.rows] == CLASSES


def test_a_separator_in_quotes_is_none(url: str, path: Path) -> None:
    path.write_text(f'\n"a;\t",b,c,d\n{ROW}')
    assert run_command("predict", str(path)).code == 0


@pytest.mark.parametrize(("given", "separator"), [("|", "|"), (" ", " "), ("tab", "\t")])
def test_any_other_separator_is_named_and_can_be_given(
    url: str, path: Path, given: str, separator: str
) -> None:
    path.write_text(lines(separator))
    if separator != "\t":
        (first, _) = run_command("predict", str(path)).err.splitlines()
        assert f"if '{separator}' separates the columns, add --separator '{given}'" in first
    ran = run_command("predict", str(path), "--separator", given)
    assert [row["class_name"] for row in ran.rows] == CLASSES


def test_a_wrong_count_of_cells_names_the_separator(url: str, path: Path) -> None:
    (problem,) = problems(path, "height; width,b,c,d\n5.1,3.5,1.4,0.2\n")
    assert "line 2: 1 cell where 2 are expected; if ';' does not separate them" in problem


def test_a_separator_that_is_none_is_refused(url: str, path: Path) -> None:
    path.write_text(ROW)
    for text in ("ab", ""):
        message = error_line(run_command("predict", str(path), "--separator", text), 2)
        assert "neither a single character nor tab" in message


# --- no rows ---------------------------------------------------------------------------------


def test_a_source_without_rows_is_told_from_one_that_was_done(url: str, tmp_path: Path) -> None:
    for name, text in {"a.csv": "", "b.csv": "\n\n", "c.ndjson": "", "d.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        ran = run_command("predict", str(tmp_path / name))
        assert (ran.code, ran.err) == (0, f"asyncinfer: {tmp_path / name} has 0 rows.\n")
    ran = run_in_shell("asyncinfer predict - --from csv -o out.csv", tmp_path)
    assert ran.err == "asyncinfer: stdin has 0 rows.\n"


def test_a_header_alone_is_said_to_be_one(url: str, path: Path) -> None:
    (line,) = problems(path, "a,b,c,d\n")
    assert "has 0 rows: the only line, 'a,b,c,d', was taken as the header" in line
    assert "--no-header" in line
    assert "--separator" not in line
    (line,) = problems(path, "a|b|c|d\n")
    assert "if it has columns that ',' does not separate, add --separator" in line


# --- cells -----------------------------------------------------------------------------------


def test_the_first_line_is_no_header_if_its_cells_are_like_numbers(url: str, path: Path) -> None:
    assert problems(path, "5,1;3,5;1,4;0,2\n") == [
        "row 1: line 1: column '1': '5,1' has a decimal comma; write a point"
    ]
    assert problems(path, "1e400,1,2,3\n") == [
        "row 1: line 1: column '1': '1e400' is beyond the largest number, 1.8e308"
    ]


def test_names_with_numbers_in_them_are_a_header(url: str, path: Path) -> None:
    assert problems(path, f"2020 01,2020 02,a 3,b;4\n{ROW}", "--separator", ",") == []


def test_numbers_as_arguments_are_told_what_is_wrong_with_them(url: str) -> None:
    for word, reason in (("5,1", "has a decimal comma"), ("1e400", "beyond the largest number")):
        assert reason in error_line(run_command("predict", "1", "2", word, "4"), 2)


def test_a_column_is_to_be_left_out_only_if_it_had_no_number(url: str, path: Path) -> None:
    assert problems(path, f"a,b,c,d\nx,1,2,3\n{ROW}x,1,2,3\n1,2,3,-1e999\n") == [
        "row 1: line 2: column 'a': 'x' is no number; leave the column out with --columns",
        "row 3: line 4: column 'a': 'x' is no number",
        "row 4: line 5: column 'd': '-1e999' is beyond the largest number, 1.8e308",
    ]


# --- columns ---------------------------------------------------------------------------------


def test_columns_are_taken_from_every_kind_of_rows(url: str, tmp_path: Path) -> None:
    rows = [[9, *row] for row in NUMBERS]
    np.save(tmp_path / "rows.npy", np.array(rows))
    (tmp_path / "rows.json").write_text(str(rows))
    (tmp_path / "rows.ndjson").write_text("\n".join(map(str, rows)))
    sources = [[str(path)] for path in sorted(tmp_path.glob("rows.*"))]
    for source in (*sources, [str(rows)], list(map(str, rows[0]))):
        ran = run_command("predict", *source, "--columns", "2,3,4,5")
        assert ran.code == 0, ran
        found = [row["class_name"] for row in ran.rows]
        assert found == CLASSES[: len(found)]


def test_columns_that_rows_do_not_have_are_refused(url: str, path: Path, tmp_path: Path) -> None:
    path.write_text(lines(",", header=True))
    np.save(tmp_path / "rows.npy", np.array(NUMBERS))
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 4)))
    for source, columns, message in (
        (path, "a,b,c,zz", f"{path} has no column 'zz', but a, b, c, d."),
        (path, "a,b,c,1", f"{path} has one column 'a', which --columns names twice."),
        (tmp_path / "rows.npy", "a", "has no column 'a', but 1, 2, 3, 4."),
        (tmp_path / "rows.npy", "1,1", "has one column '1', which --columns names twice."),
        (tmp_path / "images.npy", "1", "--columns is for rows of numbers"),
    ):
        line = error_line(run_command("predict", str(source), "--columns", columns), 2)
        assert message in line
        assert "--from" not in line
    ran = run_command("predict", "5.1", "3.5", "--columns", "1,3")
    assert ran.err == "row 1: has no column '3', but 1, 2\n"


def test_options_that_exclude_each_other_are_refused(url: str) -> None:
    row = list(map(str, NUMBERS[0]))
    for more in (("--json", "--to", "csv"), ("--resume", "x", "--fresh")):
        assert "not both" in error_line(run_command("predict", *row, *more), 2)
    assert "--watch" in error_line(run_command("job", "x", "--timeout", "1"), 2)


def test_an_option_that_does_not_apply_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "rows.ndjson").write_text(str(NUMBERS[0]))
    for flag in (("--no-header",), ("--separator", ";")):
        message = error_line(run_command("predict", str(tmp_path / "rows.ndjson"), *flag), 2)
        assert "is for CSV" in message
    for flag in (("--header",), ("--separator", ";"), ("--from", "csv")):
        message = error_line(run_command("predict", *map(str, NUMBERS[0]), *flag), 2)
        assert "is for a file or stdin" in message


# --- words -----------------------------------------------------------------------------------


def test_a_row_that_does_not_fit_is_told_in_the_same_words_from_every_format(
    url: str, path: Path, tmp_path: Path
) -> None:
    path.write_text("1,2,3\n")
    np.save(tmp_path / "rows.npy", np.array([[1.0, 2.0, 3.0]]))
    (tmp_path / "rows.ndjson").write_text("[1, 2, 3]\n")
    for source in sorted(tmp_path.glob("rows.*")):
        said = run_command("predict", str(source)).err
        assert said == "row 1: has 3 numbers, iris takes 4\n", source.name
    np.save(tmp_path / "texts.npy", np.array([list("abcd")]))
    np.save(tmp_path / "images.npy", np.zeros((1, 3, 5)))
    (tmp_path / "value.ndjson").write_text("5\n")
    for name, words in {
        "texts.npy": "has strings, iris takes FP32",
        "images.npy": "has shape [3, 5], iris takes [4]",
        "value.ndjson": "is a single value, iris takes a list of shape [4]",
    }.items():
        assert run_command("predict", str(tmp_path / name)).err == f"row 1: {words}\n"


def test_a_number_beyond_all_datatypes_is_named_in_every_format(url: str, tmp_path: Path) -> None:
    words = "'1e400' is beyond the largest number, 1.8e308"
    (tmp_path / "rows.csv").write_text("1,2,3,1e400\n1,2,3,4\n")
    (tmp_path / "rows.ndjson").write_text("[1, 2, 3, 1e400]\n[1, 2, 3, 4]\n")
    (tmp_path / "rows.json").write_text("[[1, 2, 3, 1e400], [1, 2, 3, 4]]")

    ran = run_command("predict", str(tmp_path / "rows.csv"))
    assert ran.err == f"row 1: line 1: column '4': {words}\n"
    ran = run_command("predict", str(tmp_path / "rows.ndjson"))
    assert ran.err == f"row 1: line 1: {words}\n"
    assert "error" not in ran.rows[1]
    ran = run_command("predict", str(tmp_path / "rows.json"))
    assert error_line(ran, 2) == f"asyncinfer: {tmp_path}/rows.json: {words}."
    assert error_line(run_command("predict", "[1, 2, 3, 1e400]"), 2) == f"asyncinfer: {words}."


def test_a_damaged_file_of_the_right_format_is_told_with_the_remedy(
    url: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "objects.npy", np.array([[1, "a"]], object), allow_pickle=True)
    np.save(tmp_path / "cut.npy", np.zeros((2, 4)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    for name in ("objects.npy", "cut.npy"):
        line = error_line(run_command("predict", str(tmp_path / name)), 2)
        assert f"{name} cannot be read: " in line
        assert "Save it again; an array of Python objects as numbers" in line
        assert "--from" not in line


def test_a_file_of_the_right_format_is_not_called_a_wrong_one(url: str, tmp_path: Path) -> None:
    (tmp_path / "object.json").write_text('{"a": 1}')
    np.save(tmp_path / "value.npy", np.array(5.0))
    (tmp_path / "latin.csv").write_bytes("gr\xf6\xdfe,b,c,d\n1,2,3,4\n".encode("latin-1"))
    (tmp_path / "utf16.csv").write_bytes("a,b,c,d\n1,2,3,4\n".encode("utf-16"))
    for name, words in {
        "object.json": "must be a list of rows",
        "value.npy": "has no rows, but a single value",
        "latin.csv": "it is not text in UTF-8. Save it as UTF-8",
        "utf16.csv": "It is UTF-16: save it as UTF-8.",
    }.items():
        line = error_line(run_command("predict", str(tmp_path / name)), 2)
        assert words in line
        assert "file: " not in line or name.endswith(".csv")
