"""The figures in the text are those of the committed results, and the scripts still find the library."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["train_step", "importance", "mixtures", "scaling", "gpu_cuda"])
def test_the_table_is_that_of_the_results(part):
    command = [sys.executable, ROOT / "benchmarks" / "bench.py", "--table", "--parts", part]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(table) > 2
    missing = [line for line in table if line not in TEXT.splitlines()]
    assert not missing


SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_from_the_library_is_there(path):
    """They run for minutes, so that no other test runs them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert found, f"{node.module}.{alias.name}"
