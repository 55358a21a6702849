"""Run the notebooks from their first cell to their last, in this interpreter; `make notebooks` runs them whole.

python tests/run_notebooks.py --out runs/notebooks                    # all, executed, as .ipynb
python tests/run_notebooks.py --out runs/notebooks what_a_guide_buys  # some of them
"""

import argparse
import gc
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.py"))
NOTEBOOKS = [path for path in FILES if path.read_text(encoding="utf-8").startswith("# ---\n# jupyter:")]


class ThisInterpreter(AsyncKernelManager):
    """Starts the interpreter that runs this file, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(path: Path, folder: Path, seconds: float | None) -> Any:
    """A notebook with its outputs, run in `folder`, where it finds what lies beside it; at most `seconds` a cell."""
    for beside in set(FILES) - set(NOTEBOOKS):
        shutil.copy(beside, folder)
    where = {"metadata": {"path": str(folder)}}
    manager: Any = ThisInterpreter
    client = NotebookClient(jupytext.read(path), kernel_manager_class=manager, timeout=seconds, resources=where)
    notebook = client.execute()
    del client
    gc.collect()  # what jupyter leaves open warns here and not later
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="file names without .py; all if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/notebooks"))
    arguments = parser.parse_args()
    there = {path.stem: path for path in NOTEBOOKS}
    unknown = [name for name in arguments.names if name not in there]
    if unknown:
        parser.error(f"there is no notebook {', '.join(unknown)}; there are {', '.join(there)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or there:
        started = time.perf_counter()
        notebook = execute(there[name], arguments.out, None)
        written = arguments.out / f"{name}.ipynb"
        jupytext.write(notebook, written)
        print(f"wrote {written} after {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
