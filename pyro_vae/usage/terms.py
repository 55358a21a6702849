"""The terms of the ELBO and of every latent site for each datum, block by block, from draws of the guide."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae import traces
from pyro_vae.estimators.streaming import Blocks
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.traces import Pair
from pyro_vae.usage.aggregate import log_aggregate
from pyro_vae.usage.sites import Draws, Site, draw

MAX_PAIRS = 2**22  # of a draw and a datum, for q(z), as far as two draws of each datum allow it
ROUNDING = 1e-6  # variance of what is 0 but for rounding, nats²
SHOWN = 2000  # draws that are kept for pictures, or one of each datum if that is more


@dataclass(frozen=True, eq=False)
class Terms:
    """What is kept of each datum, on the CPU.

    Attributes:
        whole: "log_likelihood", "kl" and "elbo", each a mean over the particles and its Monte Carlo variance (n, 2),
            nats; "log_q", "log_prior" and "known", the KL with what is known of it in closed form, at the draws that
            are asked for q(z), each (n, num_draws), nats.
        of: for each site "mean" and "mean_variance" of E[u | x] (n, num_units), its "kl" (n, 2), "draws" (n, num_draws,
            num_units), "prior_draws"; where there are such "kl_per_unit", "prior_loc", "prior_scale" (n, num_units).
        num_particles: draws of each datum.
        num_draws: how many of them are asked for q(z).
    """

    whole: dict[str, Tensor]
    of: dict[str, dict[str, Tensor]]
    num_particles: int
    num_draws: int


def collect(
    pair: Pair, args: tuple[Tensor, ...], sites: Sequence[Site], num_particles: int, seed: int, tiled: bool
) -> Terms:
    """The terms of all data, from `num_particles` draws of each.

    Raises:
        ValueError: the ELBO of a datum is not finite.
    """
    num_data = len(args[0])
    shown = min(num_particles, -(-SHOWN // num_data))
    num_draws = min(num_particles, max(2, shown, MAX_PAIRS // num_data**2))
    wholes, parts = [], []
    for start, stop in Blocks(pair, args, num_particles, seed, tiled).data_ranges():
        reseed(derived_seed(seed, start), args[0].device)
        some = tuple(arg[start:stop] for arg in args)
        draws = draw(pair, some, num_particles, tiled)
        prior = traces.draw_prior(pair, some, shown, tiled)
        kl = {site.name: _divergence(draws, site) for site in sites}
        wholes.append(_whole(draws, torch.stack(list(kl.values())).sum(0), num_draws))
        _check(wholes[-1]["elbo"][:, 0], start)
        parts.append({site.name: _of_site(draws, site, kl[site.name], num_draws) for site in sites})
        for site in sites:
            parts[-1][site.name]["prior_draws"] = site.rows(prior[site.name], shown).transpose(0, 1)
    of = {site.name: _joined([part[site.name] for part in parts]) for site in sites}
    return Terms(_joined(wholes), of, num_particles, num_draws)


def _divergence(draws: Draws, site: Site) -> Tensor:
    """KL of a site, (num_particles, n), nats: in closed form the same at all draws, elsewhere log q - log p."""
    if site.reason is None:
        return draws.divergence(site).sum(-1).expand_as(draws.log_q)
    return draws.log_ratio(site)


def _whole(draws: Draws, kl: Tensor, num_draws: int) -> dict[str, Tensor]:
    terms = {"log_likelihood": draws.log_likelihood, "kl": kl, "elbo": draws.log_likelihood - kl}
    asked = {"log_q": draws.log_q, "log_prior": draws.log_prior, "known": kl}
    return {name: _moments(each) for name, each in terms.items()} | {k: v[:num_draws].T for k, v in asked.items()}


def _of_site(draws: Draws, site: Site, kl: Tensor, num_draws: int) -> dict[str, Tensor]:
    rows = site.rows(draws.values[site.name], len(draws.log_q))  # (num_particles, n, num_units)
    mean, variance = rows.double().mean(0), rows.double().var(0) / len(rows)
    if site.has_mean:
        mean, variance = draws.mean(site)[0], torch.zeros_like(variance)
    found = {"kl": _moments(kl), "mean": mean, "mean_variance": variance, "draws": rows[:num_draws].transpose(0, 1)}
    if site.reason is None:
        found["kl_per_unit"] = draws.divergence(site)
    prior = draws.prior_normal(site)
    return found if prior is None else found | {"prior_loc": prior[0], "prior_scale": prior[1]}


def _moments(values: Tensor) -> Tensor:
    """Mean of (num_particles, n) and the Monte Carlo variance of the mean, (n, 2)."""
    return torch.stack([values.mean(0), values.var(0) / len(values)], -1)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All data of what every block has."""
    return {
        name: torch.cat([part[name] for part in parts]).cpu()
        for name in parts[0]
        if all(name in part for part in parts)
    }


def _check(elbo: Tensor, start: int) -> None:
    bad = (~elbo.isfinite()).nonzero()
    if len(bad):
        datum = int(bad[0])
        raise ValueError(f"the ELBO of datum {start + datum} is {float(elbo[datum])}, so it cannot be taken apart")


def mutual_information(
    terms: Terms, pair: Pair, args: tuple[Tensor, ...], sites: Sequence[Site], tiled: bool
) -> tuple[Tensor, Tensor]:
    r"""The two parts of the KL of each datum, I_q(x; z) and KL(q(z) || p(z)), which add up to it.

    At draws z ~ q(z | x_n) of every datum, i = log q(z | x_n) - log q(z) has the mean I, and the noise
    c = log q(z | x_n) - log p(z) - KL_n, with what is known of KL_n in closed form, the mean 0. So has i - β c the mean
    I for any β; taken is the β of least variance, cov(i, c) / var(c).

    Returns:
        For each part the values and their Monte Carlo variance, shape (n, 2), nats.
    """
    whole = terms.whole
    rows = {site.name: terms.of[site.name]["draws"].flatten(0, 1).to(args[0].device) for site in sites}
    log_aggregates = log_aggregate(pair, args, sites, rows, tiled).cpu().reshape(whole["log_q"].shape)
    gained = whole["log_q"] - log_aggregates  # (n, num_draws)
    noise = whole["log_q"] - whole["log_prior"] - whole["known"]
    spread = _covariance(noise, noise).mean()
    beta = _covariance(gained, noise).mean() / spread if spread > ROUNDING else 0.0
    gained = gained - beta * noise
    mean, variance = gained.mean(1), gained.var(1) / terms.num_draws
    kl, kl_variance = whole["kl"].T
    # The draws asked for q(z) are some of those of the KL, so that the means covary as single draws do over all.
    common = _covariance(whole["known"], gained) / terms.num_particles
    rest = (kl_variance + variance - 2 * common).clamp(min=0)
    return torch.stack([mean, variance], -1), torch.stack([kl - mean, rest], -1)


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    """Of the draws (n, num_draws) of each datum, (n,)."""
    return ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).sum(1) / (a.shape[1] - 1)
