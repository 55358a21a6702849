"""Annealed importance sampling of log p(x) for Pyro pairs with continuous latents, and its variant with resampling."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_vae import distributed, graphs, traces
from pyro_vae.annealing import Weights, anneal, sigmoid_schedule
from pyro_vae.checks import check_count
from pyro_vae.estimators.estimate import Estimate
from pyro_vae.estimators.hmc import GeometricPath, pilot
from pyro_vae.estimators.proposals import Proposal, with_proposal
from pyro_vae.estimators.streaming import GRADIENT_ROWS
from pyro_vae.latents import Latents
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.traces import Pair

FORWARD = 21  # stream of the seed
STARTS = ("guide", "prior")
SCALE_DRAWS = 64  # draws of the start that the length scales are read from
WORTH_A_GRAPH = 2000  # leapfrog steps, which take longer than it takes to trace a pair
MAX_STATES = 64  # joint states of discrete latents that are summed out at every leapfrog step


@dataclass(frozen=True)
class AnnealedImportanceSampling:
    """See `annealed_importance_sampling`."""

    num_steps: int
    num_chains: int
    num_leapfrog: int
    start: str
    resample: bool = False
    proposal: Proposal | None = None

    @property
    def num_particles(self) -> int:
        """Chains of each datum."""
        return self.num_chains

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        annealer = Annealer(self, pair, args, seed)
        parts = {}
        for index, (start, stop) in enumerate(annealer.blocks()):
            if distributed.takes(index):
                reseed(derived_seed(seed, FORWARD, 0, start), args[0].device)
                weights, path = annealer.forward(start, stop)
                check_chains(weights.log_weights, start)
                parts[start] = _figures(weights, path)
            progress(stop - start)
        return self._estimate(distributed.joined(parts, len(args[0]), "cpu"), annealer)

    def _estimate(self, figures: dict[str, Tensor], annealer: "Annealer") -> Estimate:
        variance = figures["variance"]
        spread = figures["log_weights"].T.contiguous().var(0) if self.num_chains > 1 else None
        return Estimate(
            log_prob=figures["log_mean"].numpy(),
            variance=variance.numpy(),
            direction="lower",
            estimator="sequential_monte_carlo" if self.resample else "annealed_importance_sampling",
            num_particles=self.num_chains,
            ess=figures["ess"].numpy(),
            spread=None if spread is None or self.resample else spread.numpy(),
            bias_bound=None if spread is None else bias_of_chains(variance, spread, self.num_chains),
            notes=self._notes(annealer, figures.get("acceptance")),
        )

    def _notes(self, annealer: "Annealer", acceptance: Tensor | None) -> tuple[str, ...]:
        chains = f"{self.num_chains} chains of {self.num_leapfrog} leapfrog steps"
        settings = f"{self.num_steps} steps from the {self.start}, {chains}"
        rate = "" if acceptance is None else f", acceptance {float(acceptance.mean()):.2f}"
        tiled = ("the programs ran on tiled data, one row per particle and datum",) if annealer.latents.tiled else ()
        states = annealer.latents.num_states
        summed = (f"discrete latents summed out over {states} joint states",) if states > 1 else ()
        return (settings + rate, *annealer.notes, *summed, *tiled)


def _figures(weights: Weights, path: GeometricPath) -> dict[str, Tensor]:
    """What is kept of a block, with the data along the first axis."""
    figures = {name: getattr(weights, name) for name in ("log_mean", "variance", "ess")}
    moves = {"acceptance": torch.stack(path.acceptance).mean(0)} if path.acceptance else {}
    return {**figures, **moves, "log_weights": weights.log_weights.T}


def annealed_importance_sampling(
    num_steps: int = 1000,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    start: str = "guide",
    *,
    resample: bool = False,
    proposal: Proposal | None = None,
) -> AnnealedImportanceSampling:
    r"""Annealed importance sampling of log p(x) with Hamiltonian Monte Carlo, for any pair with continuous latents.

    f_t(z) = r(z)^(1-β_t) p(x, z)^β_t in unconstrained coordinates, β_t a sigmoid schedule, r the guide q(z | x) or the
    prior p(z). Every chain of every datum has an accept step of its own; step sizes are tuned per datum in a pilot run
    and then frozen. E[L_n] <= log p(x_n), and P(L_n > log p(x_n) + b) < exp(-b).

    Args:
        num_steps: T, the number of intermediate densities; started from the guide about a tenth is needed of what the
            prior needs.
        num_chains: chains of each datum.
        num_leapfrog: leapfrog steps of each move.
        start: "guide", which needs log q at any z, or "prior", which also finds modes that the guide never visits.
        proposal: what stands in for the guide as start; from `refined()` a tenth of the steps will do again.
        resample: sequential Monte Carlo: where fewer than half of a datum's chains are effective they are resampled.

    Returns:
        An estimator for `log_likelihood`.

    Raises:
        ValueError: a count below 1, an unknown start, or a proposal with the prior as start; at use, a guide without
            density at given z, or discrete latents with more than 64 joint states (fewer are summed out).

    Source: Neal, "Annealed importance sampling", 2001, arXiv:physics/9803008; Wu, Burda, Salakhutdinov, Grosse, "On the
    quantitative analysis of decoder-based generative models", 2017, arXiv:1611.04273.
    """
    for name, value in (("num_steps", num_steps), ("num_chains", num_chains), ("num_leapfrog", num_leapfrog)):
        check_count(name, value)
    if start not in STARTS:
        raise ValueError(f"start must be 'guide' or 'prior', got {start!r}")
    if proposal is not None and start != "guide":
        raise ValueError(f"a proposal takes the place of the guide, so that start must be 'guide', got {start!r}")
    return AnnealedImportanceSampling(num_steps, num_chains, num_leapfrog, start, resample, proposal)


def bias_of_chains(variance: Tensor, spread: Tensor, num_chains: int) -> float:
    """Bound on how low the mean is: half the variance, or (exp(s²) - 1)/2C for normal log weights if that is more.

    The delta method's own variance comes out too small from few chains; that of the log weights does not. Where it is
    above 4 the result is flagged, and the bound does not grow further.
    """
    of_normal = torch.expm1(spread.clamp(max=4.0)) / (2 * num_chains)
    return float(torch.maximum(variance / 2, of_normal).mean())


class Annealer:
    """The annealing of a pair's data, block by block, forwards from the start or backwards from posterior draws."""

    def __init__(self, settings: AnnealedImportanceSampling, pair: Pair, args: tuple[Tensor, ...], seed: int) -> None:
        pair, args, self.notes = with_proposal(settings.proposal, pair, args, seed)
        self.settings, self.pair, self.args = settings, pair, args
        self.latents = Latents(pair, args, tiled=not traces.broadcasts(pair, args))
        if not self.latents.sites:
            raise ValueError(f"annealing needs continuous latents, this pair has {self._kinds()}; use exact()")
        if self.latents.num_states > MAX_STATES:
            raise ValueError(
                f"Hamiltonian Monte Carlo needs continuous latents: this pair has {self._kinds()}, too many to be "
                f"summed out at every step (at most {MAX_STATES}); use importance_sampling(num_particles=...)"
            )
        if settings.start == "guide":
            traces.check_density(pair, args, "annealing from the guide", "start='prior'")

    def _kinds(self) -> str:
        states = self.latents.num_states
        return f"discrete ones with {states} joint states" if states > 1 else "none"

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of data, start and stop, such that a block's chains and data fill one batch."""
        rows = GRADIENT_ROWS.get(self.args[0].device.type, GRADIENT_ROWS["cpu"])
        size = max(1, rows // self.settings.num_chains)
        for start in range(0, len(self.args[0]), size):
            yield start, min(start + size, len(self.args[0]))

    def forward(self, start: int, stop: int) -> tuple[Weights, GeometricPath]:
        """Log weights whose mean estimates p(x_n), from draws of the start."""
        path = self.tuned(start, stop)
        state = path.at(self._draw(self._block(start, stop), self.settings.num_chains))
        return anneal(path, state, resample=self.settings.resample), path

    def backward(self, start: int, stop: int, posterior: Tensor) -> Weights:
        """Log weights whose mean estimates 1/p(x_n), from a posterior draw (stop - start, dim) of each datum."""
        path = self.tuned(start, stop)
        return anneal(path, path.at(posterior.expand(self.settings.num_chains, *posterior.shape)), reverse=True)

    def tuned(self, start: int, stop: int) -> GeometricPath:
        """The path of a block, with step sizes from a pilot run."""
        args, settings = self._block(start, stop), self.settings
        scale = self._draw(args, SCALE_DRAWS).std(0)  # (n, dim)
        path = GeometricPath(self._densities(args), sigmoid_schedule(settings.num_steps), settings.num_leapfrog)
        u = self._draw(args, settings.num_chains)
        if self._worth_a_graph(u.device):
            self._replay(path, u)
        path.tuning = pilot(path, u, scale)
        return path

    def _worth_a_graph(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.settings.num_steps * self.settings.num_leapfrog >= WORTH_A_GRAPH

    def _replay(self, path: GeometricPath, u: Tensor) -> None:
        """On a GPU one step of the pair is a few hundred launches; as a CUDA graph it is one."""
        try:
            programs = self.pair.model, self.pair.guide
            path.evaluate = graphs.replayed(path.evaluate, nn.ModuleList(self.pair.modules), programs, u)
        except Exception as error:  # whatever it is, the pair itself runs, and raises it again if it is its own
            note = f"no CUDA graph: {graphs.why(error)}"
            self.notes = (*self.notes, note) if note not in self.notes else self.notes

    def _block(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return tuple(arg[start:stop] for arg in self.args)

    def _draw(self, args: tuple[Tensor, ...], count: int) -> Tensor:
        draw = self.latents.draw_guide if self.settings.start == "guide" else self.latents.draw_prior
        return draw(args, count)

    def _densities(self, args: tuple[Tensor, ...]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        if self.settings.start == "prior":
            return lambda u: self.latents.log_prior_and_joint(args, u)
        return lambda u: (self.latents.log_guide(args, u), self.latents.log_joint(args, u))


def check_chains(log_weights: Tensor, start: int) -> None:
    """NaN, +inf, or a datum whose chains all have weight zero, is an error that names the datum."""
    bad = (log_weights.isnan() | (log_weights == math.inf)).any(0) | (log_weights == -math.inf).all(0)
    if bool(bad.any()):
        datum = int(bad.nonzero()[0])
        values = log_weights[:, datum]
        value = float(values[~values.isfinite()][0])
        raise ValueError(
            f"log weights of datum {start + datum} are not finite: {value} ({int(bad.sum())} such data in its block)"
        )
