"""The notebook: its cells run, and give the outputs that it is stored with."""

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
def test_the_cells_of_the_notebook_give_the_outputs_that_it_shows(tmp_path: Path) -> None:
    stored = _read(NOTEBOOK, 4)
    executed = _read(NOTEBOOK, 4)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    options: dict[str, Any] = {"resources": {"metadata": {"path": str(tmp_path)}}}

    NotebookClient(executed, timeout=120, kernel_name="python3", **options).execute()

    for stored_cell, executed_cell in zip(stored.cells, executed.cells, strict=True):
        if stored_cell.cell_type == "code":
            assert results(executed_cell) == results(stored_cell), stored_cell.source


def results(cell: Any) -> list[str]:
    """The outputs of a cell as text, without parts that differ between runs or progress bars."""
    # One `print` may come as several messages.
    texts = ["".join(output.text for output in cell.outputs if output.get("name") == "stdout")]
    for output in cell.outputs:
        if output.output_type == "execute_result":
            texts.append(output.data["text/plain"])
        elif output.output_type == "display_data":
            texts.append(",".join(sorted(output.data)))
    return [without_varying_parts(text) for text in texts]


def without_varying_parts(text: str) -> str:
    text = re.sub(r"\b[0-9a-f]{32,64}\b", "ID", text)
    text = re.sub(r"\b\d+ (jobs? were done before|ran now|jobs?,)", r"N \1", text)
    text = re.sub(r"workers=\d+|run_times=\{.*\}", "", text)
    return re.sub(r"\d\.\d{5,}(e-\d+)?", lambda number: f"{float(number[0]):.4f}", text)


def test_the_notebook_is_stored_with_outputs_and_without_errors() -> None:
    cells = [cell for cell in _read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
