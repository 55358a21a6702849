"""Promise 6: the same call gives the same digits; blocks, order and threads move a result within its own error."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

import pyro_vae as pv
from pyro_vae.estimators import streaming
from pyro_vae.randomness import own_randomness
from verification import Row

ITEM = "6 reproducibility"
Score = Callable[[pv.Batch], pv.LogLikelihood]


@contextmanager
def block_rows(rows: int) -> Iterator[None]:
    """Blocks of another size; everything else as it is."""
    before = dict(streaming.BLOCK_ROWS)
    streaming.BLOCK_ROWS["cpu"] = rows
    try:
        yield
    finally:
        streaming.BLOCK_ROWS.update(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def estimators(small: bool) -> dict[str, object]:
    """Small annealing, since it is its random numbers that are looked at."""
    chosen = {
        "IS-500": pv.importance_sampling(500),
        "multilevel-100": pv.multilevel(100),
        "AIS T = 20": pv.annealed_importance_sampling(20, 8, 5),
        "SMC T = 20": pv.annealed_importance_sampling(20, 8, 5, resample=True),
        "router": pv.router(200, refined_particles=200, annealing=pv.annealed_importance_sampling(20, 8, 5)),
    }
    return {name: chosen[name] for name in ("multilevel-100", "AIS T = 20")} if small else chosen


def rows(small: bool) -> Iterator[Row]:
    data = pv.load_data("digits", space="binary", seed=0)
    with own_randomness(0):
        vae = pv.models.VAE(data.space, latent_dim=8, hidden_dims=(64, 64) if small else (200, 200))
    pv.fit(vae, data, num_epochs=2 if small else 30, learning_rate=3e-3, seed=0)
    batch = data.test.subset(12 if small else 100, seed=0)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    shuffled = pv.Batch(batch.obs[order], space=batch.space)
    for name, estimator in estimators(small).items():

        def score(each: pv.Batch, estimator: object = estimator) -> pv.LogLikelihood:
            return pv.log_likelihood(vae, each, estimator=estimator, seed=0, device="cpu")

        yield from _of_one(name, score, batch, shuffled, order.numpy())


def _of_one(name: str, score: Score, batch: pv.Batch, shuffled: pv.Batch, order: np.ndarray) -> Iterator[Row]:
    with threads(1):
        first, again = score(batch), score(batch)
        with block_rows(128):
            blocks = score(batch)
        other = score(shuffled)
    with threads(2):
        two = score(batch)
    same = bool((first.log_prob == again.log_prob).all())
    yield Row(ITEM, f"{name}: twice", "the same digits" if same else "other digits", "the same digits", same)
    for what, result, values in (
        ("blocks of 128 rows", blocks, blocks.log_prob),
        ("another order", other, other.log_prob[np.argsort(order)]),
    ):
        change = abs(float(np.mean(values - first.log_prob)))
        error = math.hypot(first.mc_se, result.mc_se)
        seen = f"mean moves by {change:.4f} nats, MC SE of the difference {error:.4f}"
        yield Row(ITEM, f"{name}: {what}", seen, "within 4 SE", change <= 4 * error)
    change = float(np.abs(two.log_prob - first.log_prob).max())
    yield Row(ITEM, f"{name}: 1 or 2 threads", f"largest change {change:.1e} nats", "< 1e-4", change < 1e-4)
