"""Two processes that torchrun starts give what one process gives, and end with an error when one of them is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import given_noise
import numpy as np
import pytest
import together
import torch
from commands import call, train_words, trained
from helpers import arguments, read_arrays, same

from pyro_vae import checkpoint, parallel
from pyro_vae.estimators.result import ARRAYS, LogLikelihood
from pyro_vae.objectives import make_objective
from pyro_vae.traces import as_pair

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")


def torchrun(*args, code=0, **variables):
    """What two processes print; their launcher must end with `code`."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
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
def killed(tiny, tmp_path_factory):
    """The folder of a fit whose second process was killed, and what was printed."""
    folder = tmp_path_factory.mktemp("together")
    command = train_words(tiny, folder / "killed", *together.FRAGILE)
    return folder, torchrun("-m", "pyro_vae", *command, code=1, FRAGILE="1")


@pytest.fixture(scope="module")
def folder(killed, tiny, vae_run):
    """What two processes leave behind: all of `together`, the rest of the fit that was killed among it."""
    torchrun(HERE / "together.py", killed[0], vae_run, tiny)
    return killed[0]


def test_a_process_that_is_killed_ends_the_job_with_an_error(killed):
    folder, printed = killed
    assert "SIGKILL" in printed  # or -9, as torchrun says
    epochs = len(checkpoint.load(folder / "killed" / "checkpoint.pt")["rows"])
    assert 1 <= epochs < 10
    assert not (folder / "killed" / "fit.json").exists()


def test_a_pair_that_uses_all_its_parameters_makes_no_noise(killed):
    assert "find_unused_parameters" not in killed[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_give_every_digit_of_one(folder, rank):
    expected, found = together.scores(), read_arrays(folder / f"scores_{rank}.npz")
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
    printed = (folder / "printed_0.txt").read_text()
    assert "wrote" in printed
    assert "vae: finished after 10 epochs" in printed
    assert (folder / "printed_1.txt").read_text() == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_and_parameters_are_those_of_one_process_with_the_same_global_batch(folder, rank):
    expected, found = together.fits(), read_arrays(folder / f"fits_{rank}.npz")
    assert found.keys() == expected.keys()
    assert len(found) == 3 * (len(together.OBJECTIVES) + 1)
    for name, values in expected.items():  # sums in another order, float64
        np.testing.assert_allclose(found[name], values, rtol=1e-11, atol=1e-12, err_msg=name)


def test_the_fit_that_was_killed_goes_on_to_the_digits_of_the_one_that_was_not(folder):
    states = [checkpoint.load(folder / name / "checkpoint.pt") for name in ("whole", "killed")]
    whole, killed = ({**state, "rows": [{**row, "seconds": 0} for row in state["rows"]]} for state in states)
    assert whole["rows"] == killed["rows"]
    assert same(whole["model"], killed["model"])
    assert same(whole["last"], killed["last"])
    assert json.loads((folder / "killed" / "fit.json").read_text())["processes"] == 2


def test_a_fit_goes_on_with_as_many_processes_as_it_began_with(folder, tiny):
    with pytest.raises(AssertionError, match="processes was 2, now 1"):
        trained(tiny, folder / "whole", *together.FRAGILE, "--resume")


class Counting(given_noise.Guide):
    """A guide with buffers, and what it does to them in training."""

    def __init__(self, does):
        super().__init__()
        self.does = does
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("unknown", torch.tensor(torch.nan))
        self.register_buffer("is_ready", torch.tensor(True), persistent=False)

    def forward(self, obs, context):
        if self.training:
            self.does(self, obs.detach())
        super().forward(obs, context)


MOVES = {  # what is done, and the buffer that it moves
    "a running mean": (lambda guide, obs: guide.mean.lerp_(obs.mean(0), 0.1), "mean"),
    "a count, replaced": (lambda guide, obs: setattr(guide, "count", guide.count + 0), "count"),
    "a flag": (lambda guide, obs: guide.is_ready.logical_not_(), "is_ready"),
    "a new buffer": (lambda guide, obs: guide.register_buffer("last", obs), "last"),
    "nothing": (lambda guide, obs: None, None),
}


@pytest.mark.parametrize("what", MOVES)
def test_a_pair_that_moves_its_buffers_is_refused(what, monkeypatch):
    does, name = MOVES[what]
    model, guide = given_noise.made()[0], Counting(does).double()
    pair, args = as_pair(model, guide), arguments(given_noise.data(3).train)
    modules = torch.nn.ModuleList(pair.modules)
    objective = make_objective("elbo", pair, args, num_particles=1, alpha=0.0, free_bits=0.0)
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda loss, **options: loss)  # there is one process
    state = torch.get_rng_state()
    if name is None:
        parallel.SharedGradients(objective, pair, modules, args)
    else:
        with pytest.raises(ValueError, match=rf"changes buffers of its own, .*: 1\.{name}; fit in one process"):
            parallel.SharedGradients(objective, pair, modules, args)
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_shared_is_refused(folder):
    for rank in (0, 1):
        text = (folder / f"refused_{rank}.txt").read_text()
        assert "sample runs in one process: start it without torchrun" in text
        assert "GaussianMixture is fitted by maximum likelihood in one process" in text
