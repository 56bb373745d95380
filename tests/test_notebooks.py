"""Every notebook executes from top to bottom, and is stored with its outputs."""

import asyncio
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fl_jax import data

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


NEEDED = {"02_published_results": ("fed_heart_disease",)}
"""Published data sets without which a notebook has nothing to show."""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of jupyter's own client: event loops, and the transport of the kernel
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path) -> None:
    for name in NEEDED.get(path.stem, ()):
        try:
            data.ensure_prepared(name)
        except data.DataMissing as missing:
            pytest.skip(f"{missing}")
    notebook = nbformat.read(path, as_version=4)
    with asyncio.Runner():
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.execution_count for cell in code)
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
