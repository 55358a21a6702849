"""What the tests of several processes compute: one process calls it, and two that torchrun starts run it as a program.

torchrun --nproc_per_node 2 tests/together.py FOLDER RUN
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from commands import call
from helpers import build, random_args

from pyro_vae import distributed
from pyro_vae.data import Batch
from pyro_vae.estimators.ais import annealed_importance_sampling
from pyro_vae.estimators.evaluate import log_likelihood
from pyro_vae.estimators.exact import exact
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.estimators.multilevel import multilevel
from pyro_vae.estimators.proposals import refined
from pyro_vae.estimators.result import ARRAYS
from pyro_vae.estimators.router import router
from pyro_vae.estimators.sandwich import sandwich
from pyro_vae.spaces import Binary, Labels

SPACE, LABELS = Binary((3, 3)), Labels((-1.5, -1.0, -0.9))
FEW_STEPS = {"num_steps": 3, "num_leapfrog": 2}
ESTIMATORS = {
    "importance sampling": importance_sampling(600),  # blocks of 4 of the 13 data, in parts of 512 particles
    "one block": importance_sampling(100),  # and none for the second process
    "jackknife": importance_sampling(600, jackknife=True),
    "multilevel": multilevel(50, proposal=refined(num_steps=5)),
    "annealing": annealed_importance_sampling(**FEW_STEPS, num_chains=256),  # blocks of 8
    "sequential": annealed_importance_sampling(**FEW_STEPS, num_chains=256, resample=True),
    "router": router(30, refined_particles=600, annealing=annealed_importance_sampling(**FEW_STEPS)),
    "sandwich": sandwich(importance_sampling(600), **FEW_STEPS, num_chains=512, num_simulated=6),
}


def scores():
    """Every per-datum figure of every estimator, of the marginal of a CVAE and of a model without latents."""
    cases = {name: (("VAE", SPACE, None), estimator) for name, estimator in ESTIMATORS.items()}
    cases["cvae"] = ("CVAE", SPACE, LABELS), importance_sampling(600)
    cases["exact"] = ("BernoulliMixture", SPACE, None), exact()
    found = {}
    for name, (case, estimator) in cases.items():
        result = log_likelihood(build(case), Batch(*random_args(case, 13), space=SPACE), estimator=estimator, seed=3)
        for part, each in (("", result), (", marginal", result.marginal)):
            arrays = {} if each is None else {key: getattr(each, key) for key in ARRAYS}
            found |= {f"{name}{part}: {key}": value for key, value in arrays.items() if value is not None}
        if result.certificate is not None:
            found[f"{name}: certificate"] = np.array([result.certificate.gap, result.certificate.real_spread])
    return found


def main(folder, run):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        np.savez(folder / f"scores_{distributed.rank()}.npz", **scores())
        text = call("evaluate", run, "--particles", "30", "--out", folder / "evaluation")
        (folder / f"printed_{distributed.rank()}.txt").write_text(text)
        refused = call("sample", run, code=2)
        assert "sample runs in one process: start it without torchrun" in refused


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
