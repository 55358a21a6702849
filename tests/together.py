"""What the tests of several processes compute: one process calls it, and two that torchrun starts run it as a program.

torchrun --nproc_per_node 2 tests/together.py FOLDER RUN IMAGES
"""

import sys
import warnings
from pathlib import Path

import given_noise
import numpy as np
import pyro.distributions as dist
import torch
from commands import call, trained
from helpers import build, random_args
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyro_vae import distributed, pictures
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
from pyro_vae.fitting import fit
from pyro_vae.spaces import Binary, Labels

SPACE, LABELS = Binary((3, 3)), Labels((-1.5, -1.0, -0.9))
FRAGILE = ("--model", "vae", "--guide", f"{Path(__file__).parent / 'fragile.py'}:Fragile", "--fit", "num_epochs=10")
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

OBJECTIVES = {  # the laws of guide and prior, and the settings
    "elbo": ({}, {}),
    "elbo, score": ({"law": given_noise.Scored}, {}),
    "elbo, K": ({}, {"num_particles": 3}),
    "mean field": ({}, {"objective": "mean_field"}),
    "beta": ({}, {"objective": "beta", "beta": 0.5, "kl_warmup": 1}),
    "iwae": ({}, {"objective": "iwae", "num_particles": 3}),
    "renyi": ({}, {"objective": "renyi", "num_particles": 3}),
    "dreg": ({}, {"objective": "dreg", "num_particles": 3}),
    "sticking the landing": ({}, {"objective": "sticking_the_landing", "num_particles": 2}),
    # the floors lie between the divergences of a batch and of its parts
    "free bits, closed form": ({}, {"objective": "free_bits", "free_bits": 0.5}),
    "free bits, drawn": ({"prior": dist.Laplace}, {"objective": "free_bits", "free_bits": 0.3, "num_particles": 2}),
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


def fits():
    """Gradients of every step, parameters and history of a fit by every objective, the last one twice in a row.

    Of 11 data in batches of 5 two processes have 3 and 2, and of the last datum one has nothing.
    """
    found, gradients = {}, []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: gradients.append(gradients_of(optimizer)))
    for name, (laws, settings) in OBJECTIVES.items():
        model, guide = given_noise.made(**laws)
        how = {"num_epochs": 2, "batch_size": 5, "learning_rate": 0.05, "device": "cpu", **settings}
        for time in ("", ", again")[: 1 + (name == list(OBJECTIVES)[-1])]:
            rows = fit(model, given_noise.data(11), guide=guide, **how).rows
            found[f"{name}{time}: gradients"] = torch.stack(gradients).numpy()
            values = [p.detach().flatten() for module in (model, guide) for p in module.parameters()]
            found[f"{name}{time}: parameters"] = torch.cat(values).numpy()
            elbos = [row[key] for row in rows for key in ("train_elbo", "valid_elbo") if row[key] is not None]
            found[f"{name}{time}: bounds"] = np.array(elbos)
            gradients.clear()
    hook.remove()
    return found


def gradients_of(optimizer):
    """All gradients, one after the other."""
    return torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"] if p.grad is not None])


def main(folder, run, images):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    pictures.plot_run = lambda run: []  # the slowest part of a tiny run
    with distributed.processes("cpu"):
        rank = distributed.rank()
        np.savez(folder / f"scores_{rank}.npz", **scores())
        np.savez(folder / f"fits_{rank}.npz", **fits())
        text = call("evaluate", run, "--particles", "30", "--out", folder / "evaluation")
        text += trained(images, folder / "whole", *FRAGILE)
        text += trained(images, folder / "killed", *FRAGILE, "--resume")
        (folder / f"printed_{rank}.txt").write_text(text)
        by_em = ("train", "--data", images, "--model", "gmm", "--out", folder / "em")
        (folder / f"refused_{rank}.txt").write_text(call("sample", run, code=2) + call(*by_em, code=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
