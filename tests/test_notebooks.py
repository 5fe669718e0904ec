"""Notebooks run from top to bottom, with few steps on a suite that builds in seconds."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
#: Runs after the cell that is tagged "parameters".
SMALL = """
from adamerge.suites.mini import Recipe
recipe = Recipe(train_per_task=20, test_per_task=20, base_images_per_task=20, base_steps=1, expert_steps=1)
suite, steps = Mini(["digits", "signs", "icons", "chess"], recipe=recipe), 2
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the suite is built, once for all notebooks."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_runs(path, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "commit notebooks without outputs"
    (parameters,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell(SMALL))
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=str(tmp_path))
