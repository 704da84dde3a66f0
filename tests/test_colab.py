"""The notebooks run from top to bottom, at a small size, and are kept without outputs."""

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert not cell.outputs and cell.execution_count is None, cell.source


@pytest.mark.slow
def test_clip_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "colabs" / "clip.ipynb", as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    small = {
        "RECIPE": "configs/quickstart.py:tiny",
        "WORKDIR": str(tmp_path / "run"),
        "OUT": str(tmp_path / "clip"),
    }
    override = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(override))

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a user has
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "colabs")}}
    ).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert len(pictures) == 3
    assert "largest difference between the embeddings" in printed
    assert (tmp_path / "clip" / "config.json").is_file()
