"""Two processes that torchrun starts give what one process gives, and end with an error when one of them is gone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import together
import torch
from commands import call

from pyro_vae.estimators.result import ARRAYS, LogLikelihood

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")


def torchrun(*args, code=0):
    """What two processes print; their launcher must end with `code`."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [*TORCHRUN, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _one_thread():
    """As torchrun gives each process: how a matrix product is divided among threads decides its last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(vae_run, tmp_path_factory):
    """What two processes leave behind."""
    folder = tmp_path_factory.mktemp("together")
    torchrun(HERE / "together.py", folder, vae_run)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_give_every_digit_of_one(folder, rank):
    expected = together.scores()
    with np.load(folder / f"scores_{rank}.npz") as file:
        found = dict(file)
    assert found.keys() == expected.keys()
    assert {"importance sampling: khat", "multilevel: log_prob", "cvae, marginal: log_prob"} <= found.keys()
    different = [name for name, values in expected.items() if values.tobytes() != found[name].tobytes()]
    assert different == []


def test_the_command_line_writes_once_what_one_process_writes(folder, vae_run, tmp_path):
    call("evaluate", vae_run, "--particles", "30", "--out", tmp_path)
    one, two = (LogLikelihood.load(path / "evaluation.npz") for path in (tmp_path, folder / "evaluation"))
    assert (one.digest, one.notes) == (two.digest, two.notes)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    assert "wrote" in (folder / "printed_0.txt").read_text()
    assert (folder / "printed_1.txt").read_text() == ""
