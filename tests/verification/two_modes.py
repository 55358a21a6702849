"""Promise 2: a mode that the guide never visits is caught by the certificate, and annealing from the prior finds it."""

import math
from collections.abc import Iterator

import numpy as np
from oracles import TwoModes

import pyro_vae as pv
from verification import Row

ITEM = "2 two modes"


def rows(small: bool) -> Iterator[Row]:
    pair = TwoModes()
    batch = pv.Batch(pair.draw(20 if small else 100, seed=0))
    truth = pair.log_prob(batch.obs).numpy()

    def score(estimator: object) -> pv.LogLikelihood:
        return pv.log_likelihood(pair.model, batch, guide=pair.guide, estimator=estimator, seed=0)

    importance = pv.importance_sampling(1000)
    plain = score(importance)
    error = plain.mean - truth.mean()
    seen = f"error {error:.3f} nats (log 2 = {math.log(2):.3f}), k-hat at most {plain.khat.max():.2f}, no warning: "
    seen += str(plain.warning is None)
    noise = float(np.std(plain.log_prob - truth) / math.sqrt(len(batch)))  # the data say a little about the mode
    silent = abs(error + math.log(2)) < 4 * noise and plain.khat.max() < 0.7 and plain.warning is None
    yield Row(ITEM, "IS-1000 with a one-mode guide", seen, "low by log 2, k-hat fine: the silent failure", silent)
    leapfrog = 4 if small else 10
    settings = {"num_steps": 100 if small else 1000, "start": "prior", "num_leapfrog": leapfrog}
    checked = score(pv.sandwich(importance, **settings, num_simulated=len(batch)))
    found = checked.certificate
    seen = f"granted {found.granted}; gap {found.gap:.3f} (SE {found.gap_se:.3f}) nats"
    yield Row(ITEM, "the same with --certify", seen, "certificate withheld", not found.granted)
    for start in ("prior",) if small else ("guide", "prior"):
        annealed = score(pv.annealed_importance_sampling(settings["num_steps"], start=start, num_leapfrog=leapfrog))
        error = annealed.mean - truth.mean()
        seen = f"error {error:+.4f} nats, MC SE {annealed.mc_se:.4f}"
        if start == "prior":
            yield Row(ITEM, f"AIS T = {settings['num_steps']} from the prior", seen, "within 0.05", abs(error) < 0.05)
        else:
            case = f"AIS T = {settings['num_steps']} from the one-mode guide"
            yield Row(ITEM, case, seen, "no claim: it starts where the guide is", None)
    checked = score(pv.sandwich(**settings, num_simulated=len(batch)))
    found = checked.certificate
    seen = f"granted {found.granted}; gap {found.gap:.4f} (SE {found.gap_se:.4f}) nats"
    yield Row(ITEM, "AIS from the prior with --certify", seen, "certificate granted", found.granted)
