"""The GPU's kernels without a GPU: Triton interprets them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: it comes with torch for a GPU")
def test_kernels_give_what_float64_gives():
    """In a process of its own, as Triton is told before it is imported."""
    script, environment = Path(__file__).parent / "kernels_on_cpu.py", {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
