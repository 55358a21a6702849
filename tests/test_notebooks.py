"""Every notebook runs from its first cell to its last, in the interpreter that runs the tests."""

import pytest
from run_notebooks import NOTEBOOKS, execute

SECONDS = 300  # per cell, on a busy machine


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"compare_models", "what_a_guide_buys", "write_your_own_guide"}


# nbclient and jupyter_client leave sockets and event loops to the garbage collector; what they warn of is not ours.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_ten_cells_and_shows_a_picture(path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYRO_VAE_SMALL", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = execute(path, tmp_path, SECONDS)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) <= 10
    assert all(cell.execution_count for cell in code)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    texts = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert not [text for text in texts if "TqdmWarning" not in text]  # that one is about widgets
