"""Notebooks run from top to bottom, on a suite that builds in seconds."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SMALL = "train_per_task=20, test_per_task=20, base_images_per_task=20, base_steps=1, expert_steps=1"


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    assert any("Mini()" in source for source in sources)
    for cell in notebook.cells:
        cell.source = cell.source.replace("Mini()", f"Mini(recipe=Recipe({SMALL}))").replace("steps = 100", "steps = 1")
        cell.source = cell.source.replace("import Mini\n", "import Mini\nfrom adamerge.suites.mini import Recipe\n")
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=str(tmp_path))
