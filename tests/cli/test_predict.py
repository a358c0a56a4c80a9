"""`predict` answers rows in their order, and a bad row stops no other."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.command_line import error_line, run_command, run_in_shell

ANSWER = {"prediction": 0, "class_name": "setosa"}


def test_a_row_of_the_command_line_is_answered(url: str) -> None:
    ran = run_command("predict", "5.1", "3.5", "1.4", "0.2")

    assert (ran.code, ran.err) == (0, "")
    assert ran.rows[0].items() >= {"row": 1, **ANSWER}.items()


@pytest.mark.parametrize("row", ["[5.1, 3.5, 1.4, 0.2]", "[[5.1, 3.5, 1.4, 0.2]]"])
def test_a_row_may_be_json(url: str, row: str) -> None:
    assert run_command("predict", row).rows[0].items() >= ANSWER.items()


def test_numbers_below_zero_are_no_options(url: str) -> None:
    assert run_command("predict", "-5.1", "3.5", "1.4", "-0.2").rows[0]["row"] == 1


def test_a_csv_with_a_header_is_answered_row_by_row(url: str, flowers: Path) -> None:
    ran = run_command("predict", str(flowers))

    assert [row["row"] for row in ran.rows] == [1, 2, 3]
    assert [row["class_name"] for row in ran.rows] == ["setosa", "virginica", "versicolor"]
    assert ran.err == ""


def files(folder: Path) -> dict[str, Path]:
    rows = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]
    table = pa.table({name: [row[at] for row in rows] for at, name in enumerate("abcd")})
    written = {
        "bare.csv": "\n".join(",".join(map(str, row)) for row in rows),
        "rows.tsv": "\n".join("\t".join(map(str, row)) for row in rows),
        "rows.json": json.dumps(rows),
        "request.json": json.dumps({"data": rows}),
        "rows.ndjson": "\n".join(map(json.dumps, rows)),
        "records.jsonl": "\n".join(json.dumps(dict(zip("abcd", row, strict=True))) for row in rows),
    }
    for name, text in written.items():
        (folder / name).write_text(text)
    np.save(folder / "rows.npy", np.array(rows))
    pq.write_table(table, folder / "rows.parquet")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    [
        *("bare.csv", "rows.tsv", "rows.json", "request.json", "rows.ndjson", "records.jsonl"),
        *("rows.npy", "rows.parquet"),
    ],
)
def test_every_form_of_file_gives_the_same_answers(url: str, tmp_path: Path, name: str) -> None:
    ran = run_command("predict", str(files(tmp_path)[name]))

    assert ran.code == 0, ran.err
    assert [row["class_name"] for row in ran.rows] == ["setosa", "virginica"]


@pytest.mark.parametrize("name", ["bare.csv", "rows.json", "request.json", "rows.ndjson"])
def test_a_file_with_a_byte_order_mark_is_read(url: str, tmp_path: Path, name: str) -> None:
    path = files(tmp_path)[name]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    ran = run_command("predict", str(path))

    assert [row["class_name"] for row in ran.rows] == ["setosa", "virginica"]


@pytest.mark.parametrize("name", ["rows.json", "rows.ndjson"])
def test_a_file_in_utf_16_is_refused_by_its_encoding(url: str, tmp_path: Path, name: str) -> None:
    path = files(tmp_path)[name]
    path.write_bytes(path.read_text().encode("utf-16"))

    assert "is UTF-16: save it as UTF-8" in run_command("predict", str(path)).err


def test_columns_are_chosen_by_name_or_number(url: str, tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("id,a,b,c,d,kind\nx,5.1,3.5,1.4,0.2,y\n")
    for columns in ("a,b,c,d", "2,3,4,5"):
        ran = run_command("predict", str(tmp_path / "more.csv"), "--columns", columns)
        assert ran.rows[0].items() >= ANSWER.items()


@pytest.mark.parametrize("form", ["csv", "json", "ndjson", "parquet"])
def test_answers_are_written_in_the_format_of_the_file_name(
    url: str, flowers: Path, form: str
) -> None:
    path = flowers.with_name(f"answers.{form}")
    ran = run_command("predict", str(flowers), "--output", str(path))

    assert (ran.code, ran.out) == (0, "")
    assert classes_in(path) == ["setosa", "virginica", "versicolor"]
    assert not list(path.parent.glob("*.part"))


def classes_in(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        names: list[str] = pq.read_table(path)["class_name"].to_pylist()
        return names
    text = path.read_text()
    if path.suffix == ".csv":
        return [line.split(",")[2] for line in text.splitlines()[1:]]
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    return [row["class_name"] for row in rows]


def test_a_table_is_for_people(url: str, flowers: Path) -> None:
    shown = run_command("predict", str(flowers), "--to", "table").out.splitlines()

    assert shown[0].split()[:3] == ["row", "prediction", "class_name"]
    assert shown[1].split()[:3] == ["1", "0", "setosa"]


def test_a_bad_row_among_ten_thousand_is_reported_and_stops_no_other(
    url: str, tmp_path: Path
) -> None:
    lines = ["5.1,3.5,1.4,0.2"] * 10_000
    lines[6999] = "5.1,oops,1.4,0.2"
    lines[7999] = "1,2,3"
    lines[8999] = "1,2,3,1e39"
    (tmp_path / "many.csv").write_text("\n".join(lines))

    ran = run_command("predict", str(tmp_path / "many.csv"))

    assert ran.code == 1
    assert [row["row"] for row in ran.rows] == list(range(1, 10_001))
    assert [row["row"] for row in ran.rows if "error" in row] == [7000, 8000, 9000]
    rows = [line for line in ran.err.splitlines() if line.startswith("row ")]
    assert rows == [
        "row 7000: line 7000: column '2': 'oops' is no number",
        "row 8000: line 8000: 3 cells where 4 are expected",
        "row 9000: value at 3: beyond the range of FP32, -3.40282e+38 to 3.40282e+38",
    ]


def test_a_row_that_failed_keeps_its_place_in_columns(url: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x,2,3,4\n5.1,3.5,1.4,0.2\n")

    header, first, second = run_command(
        "predict", f"{tmp_path}/rows.csv", "--to", "csv"
    ).out.splitlines()

    assert header.startswith("row,prediction,")
    assert header.endswith(",error")
    assert first.startswith("1,,")
    assert second.startswith("2,0,setosa,")


def test_stdin_is_read_and_a_pipe_has_nothing_but_data(url: str, tmp_path: Path) -> None:
    ran = run_in_shell("asyncinfer predict - | cat", tmp_path, b"[5.1, 3.5, 1.4, 0.2]\n")

    assert ran.code == 0
    assert ran.rows[0].items() >= ANSWER.items()


def test_a_pipe_that_reads_only_the_first_answers_causes_no_error_output(
    url: str, tmp_path: Path
) -> None:
    (tmp_path / "many.csv").write_text("5.1,3.5,1.4,0.2\n" * 5000)
    ran = run_in_shell("asyncinfer predict many.csv | head -1; exit ${PIPESTATUS[0]}", tmp_path)

    assert ran.code == 141
    assert "Traceback" not in ran.err
    assert len(ran.rows) == 1


def test_a_map_goes_on_where_it_stopped_and_runs_nothing_twice(url: str, flowers: Path) -> None:
    first = run_command("predict", str(flowers), "--fresh")
    group = run_command("jobs", "--limit", "1", "--json").json[0]["group"]
    jobs = run_command("jobs", "--group", group, "--json").json
    second = run_command("predict", str(flowers), "--resume", group)

    assert first.out == second.out
    assert run_command("jobs", "--group", group, "--json").json == jobs


def test_a_group_that_is_not_there_is_not_continued(url: str, flowers: Path) -> None:
    before = run_command("jobs", "--json").json
    for rows in (str(flowers), "[5.1, 3.5, 1.4, 0.2]"):
        message = error_line(run_command("predict", rows, "--resume", "flwoers"), 2)
        assert "There is no group 'flwoers' to continue, so nothing was run." in message
        assert "leave --resume out" in message
    assert run_command("jobs", "--json").json == before


def test_the_name_that_a_run_would_give_its_group_may_be_given_before_it_has_jobs(
    url: str, flowers: Path
) -> None:
    """As a run may be interrupted before its first job."""
    flowers.write_text(f"{flowers.read_text()}1,2,3,4\n")
    run_command("predict", str(flowers))
    (job, *_) = run_command("jobs", "--limit", "1", "--json").json
    run_command("purge", job["job_id"])
    assert run_command("predict", str(flowers), "--resume", job["group"]).code == 0


@pytest.mark.soak
def test_ctrl_c_says_how_to_go_on_and_cancels_the_rest(url: str, tmp_path: Path) -> None:
    run_command("pause", "digits")
    try:
        (tmp_path / "many.csv").write_text(f"{','.join(['0'] * 64)}\n" * 5000)
        argv = ("-m", "asyncinfer", "predict", "many.csv", "-m", "digits")
        with subprocess.Popen(
            [sys.executable, *argv], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stderr is not None
            while not (jobs := run_command("jobs", "--status", "pending", "--json").json):
                pass
            group = jobs[0]["group"]
            os.kill(process.pid, signal.SIGINT)
            message = process.stderr.read().decode()
            assert process.wait(20) == 130
        assert "Interrupted after 0 rows" in message
        assert f"asyncinfer predict many.csv -m digits --resume {group}" in message
        assert "Traceback" not in message
        assert not run_command("jobs", "--group", group, "--status", "pending", "--json").json
    finally:
        run_command("resume", "digits")


# --- failures --------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_refused(url: str) -> None:
    assert "There is no file nope.csv" in error_line(run_command("predict", "nope.csv"), 2)


def test_a_file_that_is_no_csv_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\x89PNG\x00\xff\xfe")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b.csv")

    assert "is no CSV file" in error_line(run_command("predict", f"{tmp_path}/a.csv"), 2)
    assert "--from parquet" in error_line(run_command("predict", f"{tmp_path}/b.csv"), 2)


@pytest.mark.parametrize("name", ["flowers.csv", "./flowers.csv", "soft.csv", "hard.csv"])
def test_an_output_that_is_the_input_is_refused_and_nothing_is_lost(
    flowers: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No server runs: the refusal comes before anything is opened."""
    monkeypatch.chdir(flowers.parent)
    Path("soft.csv").symlink_to(flowers)
    Path("hard.csv").hardlink_to(flowers)
    rows = flowers.read_text()
    for source, output in (("flowers.csv", name), (name, "flowers.csv")):
        message = error_line(run_command("predict", source, "--output", output), 2)
        assert "is the file of the rows" in message
    assert flowers.read_text() == rows
    assert not list(flowers.parent.glob("*.part"))


def test_an_output_that_would_pass_through_the_input_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "rows.csv.part"
    part.write_text("1,2,3,4\n")

    output = ("--from", "csv", "--output", f"{tmp_path}/rows.csv")
    assert "is the file of the rows" in error_line(run_command("predict", str(part), *output), 2)
    assert part.read_text() == "1,2,3,4\n"


@pytest.mark.parametrize(
    "command",
    [
        "predict - --from csv -o flowers.csv < flowers.csv",
        "predict flowers.csv --to csv >> flowers.csv",
        "predict - --from csv --to csv < flowers.csv >> flowers.csv",
    ],
)
def test_an_output_that_the_shell_opened_as_the_input_is_refused(
    flowers: Path, command: str
) -> None:
    rows = flowers.read_text()
    message = error_line(run_in_shell(f"asyncinfer {command}", flowers.parent), 2)
    assert "is the file of the rows" in message
    assert flowers.read_text() == rows


def test_a_stdin_that_is_closed_is_refused(tmp_path: Path) -> None:
    assert "stdin is closed" in error_line(run_in_shell("asyncinfer predict - <&-", tmp_path), 2)


def test_an_output_that_is_a_folder_is_refused(flowers: Path) -> None:
    argv = ("predict", str(flowers), "--to", "csv", "--output", str(flowers.parent))
    assert "is a folder" in error_line(run_command(*argv), 2)


def test_a_file_name_that_shows_no_format_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("1,2,3,4")

    assert "--from" in error_line(run_command("predict", f"{tmp_path}/rows"), 2)
    assert "--to" in error_line(
        run_command("predict", "1", "2", "3", "4", "-o", f"{tmp_path}/x"), 2
    )


def test_a_column_that_is_not_there_is_refused(url: str, flowers: Path) -> None:
    message = error_line(run_command("predict", str(flowers), "--columns", "a,z"), 2)

    assert "no column 'z', but a, b, c, d" in message


def test_an_unknown_model_is_refused_with_those_there_are(url: str, flowers: Path) -> None:
    message = error_line(run_command("predict", str(flowers), "--model", "nope"), 1)

    assert "Known: `digits`, `iris`" in message


def test_an_unknown_option_is_refused(url: str) -> None:
    assert "--modle" in error_line(run_command("predict", "1", "--modle", "iris"), 2)
