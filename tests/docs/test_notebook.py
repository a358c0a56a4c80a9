"""The notebook of the documents runs, and shows what it is shown with."""

import re
from pathlib import Path
from typing import Any, Final

import nbformat
import pytest
from nbclient import NotebookClient

from tests.process import REPOSITORY

NOTEBOOK: Final = REPOSITORY / "asyncinfer" / "docs" / "notebook.ipynb"
_read: Any = nbformat.read  # untyped


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter's own
def test_the_notebook_does_what_it_shows(tmp_path: Path) -> None:
    shown = _read(NOTEBOOK, 4)
    ran = _read(NOTEBOOK, 4)
    for cell in ran.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    options: dict[str, Any] = {"resources": {"metadata": {"path": str(tmp_path)}}}

    NotebookClient(ran, timeout=120, kernel_name="python3", **options).execute()

    for told, said in zip(shown.cells, ran.cells, strict=True):
        if told.cell_type == "code":
            assert results(said) == results(told), told.source


def results(cell: Any) -> list[str]:
    """What a cell gave as text, but for what differs from day to day; bars are left out."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        elif output.output_type == "execute_result":
            texts.append(output.data["text/plain"])
        elif output.output_type == "display_data":
            texts.append(",".join(sorted(output.data)))
    return [as_any_day(text) for text in texts]


def as_any_day(text: str) -> str:
    text = re.sub(r"\b[0-9a-f]{32,64}\b", "ID", text)
    text = re.sub(r"\b\d+ (jobs? were done before|ran now|jobs?,)", r"N \1", text)
    text = re.sub(r"workers=\d+|run_times=\{.*\}", "", text)
    return re.sub(r"\d\.\d{5,}(e-\d+)?", lambda number: f"{float(number[0]):.4f}", text)


def test_the_notebook_is_kept_with_its_outputs_and_no_errors() -> None:
    cells = [one for one in _read(NOTEBOOK, 4).cells if one.cell_type == "code"]
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
