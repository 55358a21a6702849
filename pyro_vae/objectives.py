"""What a fit by SVI maximises, by name: the ELBO, bounds from several particles, gradients of less noise, free bits.

All are made of log w_k = log p(x | z_k) + c (log p(z_k) - log q(z_k | x)) at z_k ~ q(z | x), k = 1, ..., K, for each
datum; see `particles`. The weight c is 1, or what a training schedule says, in every objective.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae import distributed, traces
from pyro_vae.particles import Particles
from pyro_vae.randomness import own_randomness
from pyro_vae.traces import Latent, Pair, Weight

PYRO: dict[str, Any] = {"elbo": Trace_ELBO, "beta": Trace_ELBO, "mean_field": TraceMeanField_ELBO}
SCORED = ("elbo", "beta")  # where a site is not reparameterised, they take its score
SEVERAL = ("iwae", "renyi", "dreg")  # with one particle they are the ELBO
OBJECTIVES = (*PYRO, *SEVERAL, "sticking_the_landing", "free_bits")
OTHER_NAMES = {"trace": "elbo"}


class Objective(Protocol):
    """What a fit maximises, and the bound on log p that its parameters are chosen by."""

    @property
    def is_bound(self) -> bool:
        """Whether minus the loss is a lower bound on log p(x) in expectation, at KL weight 1."""

    def loss(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight) -> Tensor:
        """Minus the objective, nats per datum, to be differentiated; `weight` is that of the latent terms."""

    def bound(self, pair: Pair, args: tuple[Tensor, ...]) -> float:
        """A lower bound on Σ_n log p(x_n) in expectation, nats, with nothing weighted or floored."""


def elbo(log_weights: Tensor) -> Tensor:
    """1/K Σ_k log w_k of each datum: (num_particles, n) to (n,), nats, a lower bound on log p(x) in expectation."""
    return log_weights.mean(0)


def renyi(log_weights: Tensor, alpha: float = 0.0) -> Tensor:
    r"""The Rényi bound of each datum, 1/(1-α) log 1/K Σ_k w_k^(1-α); with α = 0 the importance weighted one, L_K.

    Args:
        log_weights: shape (num_particles, n), nats.
        alpha: any number but 1, towards which the bound tends to the ELBO.

    Returns:
        Shape (n,), nats. ELBO <= the bound <= L_K for α in [0, 1], so that it is a lower bound on log p(x) in
        expectation, as it is for α > 1, below the ELBO. For α < 0 it may lie on either side.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519; Li, Turner, "Rényi
    Divergence Variational Inference", 2016, arXiv:1602.02311.
    """
    order = 1 - alpha
    return ((order * log_weights).logsumexp(0) - math.log(len(log_weights))) / order


@dataclass(frozen=True)
class Elbo:
    """The ELBO, E_q log w, with the gradients of Pyro's to the digit.

    With c = β, other than 1, it is that of Higgins et al., "beta-VAE", 2017 (ICLR).

    Attributes:
        pyro_elbo: Pyro's of the same K.
        together: whether the K particles of a datum are drawn under one outer plate.
        is_pathwise: whether all draws are differentiable; otherwise the loss is Pyro's own, with the score of the
            site that is not.
    """

    pyro_elbo: Any
    together: bool
    is_pathwise: bool
    is_bound: ClassVar[bool] = True

    def loss(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight) -> Tensor:
        if self.is_pathwise:
            closed_form, num = isinstance(self.pyro_elbo, TraceMeanField_ELBO), self.pyro_elbo.num_particles
            return -traces.elbo(pair, args, num, self.together, weight, closed_form) / len(args[0])
        with nullcontext() if isinstance(weight, int | float) and weight == 1 else traces.scaled_latents(weight):
            return self.pyro_elbo.differentiable_loss(pair.model, pair.guide, *args) / len(args[0])

    def bound(self, pair: Pair, args: tuple[Tensor, ...]) -> float:
        return -self.pyro_elbo.loss(pair.model, pair.guide, *args)


@dataclass(frozen=True)
class Renyi:
    """`renyi` with the gradient of the bound as it stands; for α < 0 it is judged by L_K."""

    particles: Particles
    alpha: float = 0.0

    @property
    def is_bound(self) -> bool:
        return self.alpha >= 0

    def loss(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight) -> Tensor:
        return -renyi(self.particles.log_weights(pair, args, weight), self.alpha).mean()

    @torch.no_grad()
    def bound(self, pair: Pair, args: tuple[Tensor, ...]) -> float:
        return float(renyi(self.particles.log_weights(pair, args), max(self.alpha, 0.0)).sum())


@dataclass(frozen=True)
class DoublyReparameterised:
    r"""The importance weighted bound L_K with the doubly reparameterised gradient of q.

    With v_k = w_k / Σ_j w_j, the gradient of q is Σ_k v_k² (∂ log w_k / ∂z_k) (dz_k / dφ): what the bound gives at z_k,
    v_k ∂ log w_k / ∂z_k, times v_k once more. At a KL weight c the score that it stands for is c times as large, and
    the factor is 1 - c + c v_k. The gradient of p is that of L_K.

    Attributes:
        particles: K and how they are run.
        event_dims: number of event dimensions of each latent site.

    Source: Tucker, Lawson, Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019,
    arXiv:1810.04152.
    """

    particles: Particles
    event_dims: Mapping[str, int]
    is_bound: ClassVar[bool] = True

    def loss(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight) -> Tensor:
        log_weights, draws = self.particles.path_log_weights(pair, args, weight)
        factor = 1 - weight + weight * log_weights.detach().softmax(0)  # (num_particles, n)
        for name, value in draws.items():
            if value.requires_grad:
                _scale_gradient(value, factor.flatten() if self.particles.tiled else factor, self.event_dims[name])
        return -renyi(log_weights).mean()

    @torch.no_grad()
    def bound(self, pair: Pair, args: tuple[Tensor, ...]) -> float:
        return float(renyi(self.particles.log_weights(pair, args)).sum())


def _scale_gradient(value: Tensor, factor: Tensor, event_dim: int) -> None:
    """Multiply the gradient that arrives at `value` (..., *batch, *event) by `factor`, of shape (*batch)."""
    factor = factor[(..., *(None,) * event_dim)].to(value.dtype)
    value.register_hook(lambda gradient: gradient * factor)


@dataclass(frozen=True)
class StickingTheLanding:
    r"""The ELBO with the gradient of q through its draws alone, 1/K Σ_k (∂ log w_k / ∂z_k) (dz_k / dφ).

    The term left out, the score -∂ log q(z_k | x) / ∂φ at fixed z_k, has mean zero; without it the gradient is zero at
    every draw where q is the posterior.

    Source: Roeder, Wu, Duvenaud, "Sticking the landing: Simple, Lower-Variance Gradient Estimators for Variational
    Inference", 2017, arXiv:1703.09194.
    """

    particles: Particles
    is_bound: ClassVar[bool] = True

    def loss(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight) -> Tensor:
        return -elbo(self.particles.path_log_weights(pair, args, weight)[0]).mean()

    @torch.no_grad()
    def bound(self, pair: Pair, args: tuple[Tensor, ...]) -> float:
        return float(elbo(self.particles.log_weights(pair, args)).sum())


@dataclass(frozen=True)
class FreeBits:
    r"""E_q log p(x | z) - c Σ_j max(λ, KL_j), with KL_j the mean over the minibatch of the divergence of group j.

    A group is one latent dimension where both laws of its site are independent normals, whose divergence is known in
    closed form. Otherwise it is a whole site of D dimensions, with the Monte Carlo divergence and the floor D λ.

    Attributes:
        particles: K and how they are run.
        floor: λ, nats per latent dimension.
        in_order: whether guide and model draw their sites in the same order. If not, a law of the model may depend on
            what is drawn after the site, and the closed form, which averages over the site alone, would be wrong.

    Source: Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", 2016, arXiv:1606.04934,
    appendix C.8.
    """

    particles: Particles
    floor: float
    in_order: bool
    is_bound: ClassVar[bool] = False

    def loss(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight) -> Tensor:
        latents, log_likelihood = traces.latent_terms(pair, args, self.particles.num, self.particles.tiled)
        floored = sum(self._floored(latent).double() for latent in latents.values())
        return weight * floored - log_likelihood.mean()

    @torch.no_grad()
    def bound(self, pair: Pair, args: tuple[Tensor, ...]) -> float:
        return float(elbo(self.particles.log_weights(pair, args)).sum())

    def _floored(self, latent: Latent) -> Tensor:
        """Σ_j max(λ, KL_j) over the groups of one site, nats per datum."""
        posterior, prior = traces.independent_normals(latent.posterior), traces.independent_normals(latent.prior)
        if posterior is None or prior is None or not self.in_order:
            return distributed.over_batch(-latent.log_ratio.mean()).clamp(min=self.floor * latent.num_dims)
        divergence = kl_divergence(posterior, prior)  # (num_particles, n, *event), or (..., rows, *event) if tiled
        rows = divergence if self.particles.tiled else divergence.flatten(0, 1)
        mean = rows.mean(-1 - latent.posterior.event_dim)
        return distributed.over_batch(mean).clamp(min=self.floor).sum()


def make_objective(
    name: str, pair: Pair, args: tuple[Tensor, ...], *, num_particles: int, alpha: float, free_bits: float
) -> Objective:
    """An objective by name, for one pair.

    Args:
        name: one of `OBJECTIVES`.
        pair: model and guide.
        args: of two data or more, on which the pair is tried out.
        num_particles: K.
        alpha: of "renyi".
        free_bits: λ of "free_bits", nats.

    Raises:
        ValueError: the guide is not reparameterised, or it has no density where the objective needs one.
    """
    # The ELBO's fits have never drawn here, those of other objectives always: both keep their digits.
    with own_randomness(0, args[0].device) if name in PYRO else nullcontext(), torch.no_grad():
        posteriors = {} if name in SCORED else traces.laws(Pair(pair.guide, pair.guide), args)
        _check_reparameterised(name, posteriors)
        if name == "mean_field":
            _check_order(pair, args)
        if name in PYRO:
            together = num_particles > 1 and _takes_plate(pair, args)  # else one run for each
            vectorize = {"vectorize_particles": True, "max_plate_nesting": 1} if together else {}
            pyro_elbo = PYRO[name](num_particles=num_particles, **vectorize)
            is_pathwise = name not in SCORED or traces.is_pathwise(pair, args)
            return Elbo(pyro_elbo, together, is_pathwise)
        particles = Particles(num_particles, tiled=not traces.broadcasts(pair, args))
    if name == "free_bits":
        return FreeBits(particles, free_bits, _in_order(pair, args))
    if name in ("iwae", "renyi"):
        return Renyi(particles, alpha if name == "renyi" else 0.0)
    traces.check_density(pair, args, f"objective {name!r}", "objective 'iwae' or 'elbo'")
    if name == "sticking_the_landing":
        return StickingTheLanding(particles)
    return DoublyReparameterised(particles, {site: law.event_dim for site, law in posteriors.items()})


def _takes_plate(pair: Pair, args: tuple[Tensor, ...]) -> bool:
    """Whether the programs may run under an outer plate; in evaluation mode, where dropout makes no two runs differ."""
    modes = {module: module.training for root in pair.modules for module in root.modules()}
    for root in pair.modules:
        root.eval()
    try:
        return traces.broadcasts(pair, args, with_density=False)
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def particles_as_needed(name: str, pair: Pair) -> Iterator[None]:
    """Let families spread draws over the particles inside, where the objective is a sum over them.

    What couples particles needs independent ones. Afterwards the families are as they were.
    """
    modules = {module for root in pair.modules for module in root.modules()} if name in SEVERAL else set()
    families = [module for module in modules if getattr(module, "stratified", None) is True]
    own = {module for module in families if "stratified" in vars(module)}  # and not the attribute of a class
    for module in families:
        vars(module)["stratified"] = False
    try:
        yield
    finally:
        for module in families:
            vars(module).pop("stratified")
            if module in own:
                vars(module)["stratified"] = True


def _in_order(pair: Pair, args: tuple[Tensor, ...]) -> bool:
    """Whether guide and model draw their latent sites in the same order."""
    with own_randomness(0, args[0].device):  # to look must not move the noise of the fit
        guide, model = (list(traces.laws(Pair(program, program), args)) for program in (pair.guide, pair.model))
    return guide == model


def _check_order(pair: Pair, args: tuple[Tensor, ...]) -> None:
    if not _in_order(pair, args):
        raise ValueError(
            "objective 'mean_field' averages the divergence of a site over that site alone, which is no bound where "
            "model and guide draw their sites in different orders, as these do; use objective 'elbo'"
        )


def _check_reparameterised(name: str, posteriors: Mapping[str, Any]) -> None:
    for site, law in posteriors.items():
        if not law.has_rsample:
            raise ValueError(
                f"objective {name!r} needs a guide whose draws are differentiable, and site {site!r} is drawn from "
                f"{type(traces.innermost(law)).__name__}, which is not; use objective 'elbo'"
            )
