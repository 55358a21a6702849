"""The figures in the text are those of the committed results."""

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
