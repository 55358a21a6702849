"""Every notebook runs from its first cell to its last, in the interpreter that runs the tests."""

import gc
import shutil
import sys
from pathlib import Path

import jupytext
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FILES = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.py"))
NOTEBOOKS = [path for path in FILES if path.read_text(encoding="utf-8").startswith("# ---\n# jupyter:")]
SECONDS = 300  # per cell, on a busy machine


class ThisInterpreter(AsyncKernelManager):
    """Starts the interpreter that runs the tests, whatever kernels are installed."""

    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(notebook, folder):
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_manager_class=ThisInterpreter, timeout=SECONDS, resources=where)
    notebook = client.execute()
    del client
    gc.collect()  # what jupyter leaves open warns here and not in another test
    return notebook


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
    for beside in set(FILES) - set(NOTEBOOKS):  # what a notebook finds in its own folder
        shutil.copy(beside, tmp_path)
    notebook = execute(jupytext.read(path), tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) <= 10
    assert all(cell.execution_count for cell in code)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    texts = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert not [text for text in texts if "TqdmWarning" not in text]  # that one is about widgets
