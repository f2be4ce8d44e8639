"""The notebook of the first minutes, executed by a real Jupyter kernel, offline, with a shorter training."""

import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("efficientnet_lite_pytorch")
EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not beside these tests")
OFFLINE = "import socket\nsocket.socket.connect = lambda *_: (_ for _ in ()).throw(OSError('no network here'))"


def outputs_of(notebook, kind):
    return [
        output["data"][kind] for cell in notebook.cells for output in cell.get("outputs", []) if kind in output.get("data", {})
    ]


def test_the_first_minutes(tmp_path):
    notebook = nbformat.read(EXAMPLES / "first_minutes.ipynb", as_version=4)
    shutil.copy(EXAMPLES / "own_network.py", tmp_path)
    (run,) = (cell for cell in notebook.cells if cell.source == "%run own_network.py --out mine")
    run.source += " --steps 20"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    drawn = outputs_of(notebook, "image/png")
    assert len(drawn) == 5 and all(len(png) > 10_000 for png in drawn) and len(outputs_of(notebook, "image/gif")) == 1
    assert (tmp_path / "mine" / "all" / "index.html").stat().st_size > 10_000
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "50 pictures explained" in said and "UserWarning" not in said  # torch 2.11 exports with a FutureWarning of its own


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(EXAMPLES / "first_minutes.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
