"""Promise 3: annealing against closed forms: log p of PPCA, brackets from both sides, log Z of a small RBM on MNIST."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from oracles import LinearGaussian
from torch import Tensor
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.annealing import log_partition, sigmoid_schedule
from pyro_vae.estimators.sandwich import SIMULATION, Sandwich
from pyro_vae.randomness import derived_seed, own_randomness
from verification import Row

ITEM = "3 annealing"


class RBM:
    """p(v) = Σ_h exp(b'v + c'h + v'W h)/Z over bits; with few hidden units log Z is a sum over all their states."""

    def __init__(self, num_visible: int, num_hidden: int) -> None:
        self.weights = 0.01 * torch.randn(num_visible, num_hidden)
        self.visible, self.hidden = torch.zeros(num_visible), torch.zeros(num_hidden)

    def fit(self, bits: Tensor, epochs: int, batch_size: int = 100, rate: float = 0.05) -> None:
        """Persistent contrastive divergence (Tieleman, "Training restricted Boltzmann machines ...", 2008)."""
        mean = bits.mean(0).clamp(1e-3, 1 - 1e-3)
        self.visible = torch.logit(mean)
        chains = torch.bernoulli(mean.expand(batch_size, -1))
        steps = epochs * (len(bits) // batch_size)
        for step in range(steps):
            data = bits[torch.randint(len(bits), (batch_size,))]
            hidden = torch.sigmoid(self.hidden + chains @ self.weights)
            chains = torch.bernoulli(torch.sigmoid(self.visible + torch.bernoulli(hidden) @ self.weights.T))
            up, down = (torch.sigmoid(self.hidden + v @ self.weights) for v in (data, chains))
            now = rate * (1 - step / steps)
            self.weights += now * (data.T @ up - chains.T @ down) / batch_size
            self.visible += now * (data - chains).mean(0)
            self.hidden += now * (up - down).mean(0)

    def log_z(self) -> float:
        """Enumeration of the hidden units, 2^num_hidden states."""
        count = len(self.hidden)
        parts = []
        for block in torch.arange(2**count).split(2**14):
            states = (block[:, None] >> torch.arange(count) & 1).double()
            visible = self.visible.double() + states @ self.weights.double().T
            parts.append((states @ self.hidden.double() + functional.softplus(visible).sum(1)).logsumexp(0))
        return float(torch.stack(parts).logsumexp(0))


class FromBaseRates:
    """f_t(v) = exp((1-β)a'v + β b'v) Π_j (1 + exp(β(c_j + v'W_j))), from independent bits at the data's rates.

    Source: Salakhutdinov, Murray, "On the quantitative analysis of deep belief networks", 2008.
    """

    def __init__(self, rbm: RBM, base: Tensor, num_steps: int) -> None:
        self.rbm, self.base, self.num_steps = rbm, base, num_steps
        self.betas = sigmoid_schedule(num_steps).tolist()

    def draw(self, num_chains: int) -> Tensor:
        return torch.bernoulli(torch.sigmoid(self.base).expand(num_chains, -1))

    @property
    def log_z_start(self) -> float:
        return len(self.rbm.hidden) * math.log(2) + float(functional.softplus(self.base.double()).sum())

    def log_density(self, state: Tensor, step: int) -> Tensor:
        beta, rbm = self.betas[step], self.rbm
        linear = state @ torch.lerp(self.base, rbm.visible, beta)
        return linear.double() + functional.softplus(beta * (rbm.hidden + state @ rbm.weights)).double().sum(-1)

    def move(self, state: Tensor, step: int) -> Tensor:
        beta, rbm = self.betas[step], self.rbm
        hidden = torch.bernoulli(torch.sigmoid(beta * (rbm.hidden + state @ rbm.weights)))
        return torch.bernoulli(torch.sigmoid(torch.lerp(self.base, rbm.visible, beta) + beta * hidden @ rbm.weights.T))

    def take(self, state: Tensor, chains: Tensor) -> Tensor:
        return state[chains]


def ppca(small: bool) -> Iterator[Row]:
    pair = LinearGaussian(20, 10, guide="mean_field")
    obs = pair.draw(10 if small else 50, seed=0)
    truth = pair.log_prob(obs).numpy()
    steps = 100 if small else 1000
    estimator = pv.annealed_importance_sampling(steps)
    result = pv.log_likelihood(pair.model, pv.Batch(obs), guide=pair.guide, estimator=estimator, seed=0)
    error = result.mean - truth.mean()
    seen = f"mean error {error:+.4f} nats, rms per datum {np.sqrt(np.mean((result.log_prob - truth) ** 2)):.3f}"
    yield Row(ITEM, f"AIS on PPCA d = 10, T = {steps}, {len(obs)} data", seen, "< 0.05", abs(error) < 0.05)


def intervals(small: bool) -> Iterator[Row]:
    """Of the mean of many data: the weights of few steps do not tell how low they are, and are never trusted alone."""
    pair = LinearGaussian(20, 10, guide="mean_field")
    repeats, num_data = (3, 10) if small else (20, 100)
    estimators = {
        "AIS T = 30 without certificate": pv.annealed_importance_sampling(30, num_leapfrog=4),
        "SMC T = 5 from the prior": pv.annealed_importance_sampling(5, 16, 4, "prior", resample=True),
    }
    for name, estimator in estimators.items():
        covered, warned = [], []
        for repeat in range(repeats):
            obs = pair.draw(num_data, seed=repeat)
            found = pv.log_likelihood(pair.model, pv.Batch(obs), guide=pair.guide, estimator=estimator, seed=repeat)
            interval = found.interval()
            covered.append(float(pair.log_prob(obs).mean()) in interval)
            warned.append(interval.warning is not None)
        kept = [inside for inside, warning in zip(covered, warned, strict=True) if not warning]
        rate = f"{np.mean(kept):.3f} of {len(kept)} without warning" if kept else "none without warning"
        seen = f"{rate}, {np.mean(covered):.3f} of all {repeats}"
        yield Row(ITEM, f"{name} on PPCA d = 10, mean of {num_data}", seen, "warned of, always", all(warned))


def brackets(small: bool) -> Iterator[Row]:
    """On the simulated data themselves, whose log p is known too."""
    pair = LinearGaussian(20, 10, guide="mean_field")
    batch = pv.Batch(pair.draw(2, seed=0))
    limits = []
    for steps in (5, 30) if small else (10, 100, 1000):
        estimator = pv.sandwich(num_steps=steps, num_simulated=8 if small else 50, tolerance=10.0)
        found = pv.log_likelihood(pair.model, batch, guide=pair.guide, estimator=estimator, seed=0).certificate
        simulated = simulated_obs(pair, batch, estimator)
        truth = float(pair.log_prob(simulated).mean())
        limits.append(found.gap + 2 * found.gap_se)
        margin = 2 * found.gap_se
        holds = found.lower - margin <= truth <= found.upper + margin
        seen = f"[{found.lower:.4f}, {found.upper:.4f}], truth {truth:.4f}, gap {found.gap:.4f} (SE {found.gap_se:.4f})"
        yield Row(ITEM, f"BDMC bracket, T = {steps}", seen, "contains the truth within 2 SE of the gap", holds)
    shrinks = all(later < earlier for earlier, later in pairwise(limits))
    seen = ", ".join(f"{limit:.4f}" for limit in limits)
    yield Row(ITEM, "BDMC gap + 2 SE over T", seen, "shrinking", shrinks)


def simulated_obs(pair: LinearGaussian, batch: pv.Batch, estimator: Sandwich) -> Tensor:
    """The data that `sandwich` simulates with seed 0, drawn again."""
    with own_randomness(derived_seed(0, SIMULATION)):
        return traces.simulate(traces.Pair(pair.model, pair.guide), (batch.obs[estimator.choose(len(batch), 0)],))[
            "obs"
        ]


def rbm(small: bool, root: str | None) -> Iterator[Row]:
    data = pv.load_data("digits" if small else "mnist", space="binary", root=root, seed=0, binarization="static")
    bits = data.train.obs.flatten(1)
    with own_randomness(0):
        machine = RBM(bits.shape[1], 8 if small else 20)
        machine.fit(bits, epochs=10 if small else 5)
    steps = 300 if small else 10_000
    path = FromBaseRates(machine, torch.logit(bits.mean(0).clamp(1e-3, 1 - 1e-3)), steps)
    found = log_partition(path, lambda: path.draw(100), log_z_start=path.log_z_start, seed=0)
    truth = machine.log_z()
    name = f"RBM-{len(machine.hidden)} on {data.name} ({bits.shape[1]} pixels), T = {steps}, 100 chains"
    seen = f"log Z {found.log_z:.4f} (SE {found.se:.4f}), enumeration {truth:.4f}: error {found.log_z - truth:+.4f}"
    yield Row(ITEM, name, seen, "within 0.1", abs(found.log_z - truth) < 0.1)
