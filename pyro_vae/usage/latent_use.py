"""What a fitted pair does with its latents: active units, the KL of each unit, the ELBO taken apart."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae import traces
from pyro_vae.bound_rows import Figure, figure
from pyro_vae.checks import check_count
from pyro_vae.data import Batch
from pyro_vae.estimators.evaluate import checked_space, prepared
from pyro_vae.rows import finite
from pyro_vae.traces import Program
from pyro_vae.usage import tables
from pyro_vae.usage.aggregate import why_not
from pyro_vae.usage.rows import SiteUse, unit_variance
from pyro_vae.usage.sites import Site, find_sites
from pyro_vae.usage.terms import Terms, collect, mutual_information


@dataclass(frozen=True, eq=False, repr=False)
class LatentUse:
    r"""How the latents of a pair are used, in nats per datum.

        ELBO = reconstruction - KL,    KL = mutual information + marginal KL

    Attributes:
        sites: one entry for each latent site, in the order of the guide.
        elbo: E log p(x, z) - log q(z | x), a lower bound on log p(x).
        reconstruction: E log p(x | z).
        kl: E KL(q(z | x) || p(z)), of all sites together.
        mutual_information: I_q(x; z) of the data given, at most log N and in expectation at most that of their
            population; None if unknown.
        marginal_kl: KL(q(z) || p(z)) of the data given, in expectation at least that of their population.
        skipped: why these two are unknown, or None.
        num_data: N.
        num_particles: draws of each datum.
        num_draws: how many of them were asked for q(z).
        seed: of the draws.
        space: where the data live, in words.
        digest: SHA-256 of the data.
        posterior_draws: of q(z), shape (m, units of `latents`), for pictures.
        prior_draws: of p(z), same shape.
    """

    sites: tuple[SiteUse, ...]
    elbo: Figure
    reconstruction: Figure
    kl: Figure
    mutual_information: Figure | None
    marginal_kl: Figure | None
    skipped: str | None
    num_data: int
    num_particles: int
    num_draws: int
    seed: int
    space: str
    digest: str
    posterior_draws: np.ndarray
    prior_draws: np.ndarray

    def __repr__(self) -> str:
        return self.table()

    @property
    def latents(self) -> tuple[SiteUse, ...]:
        """The sites that are latents of the model, and not auxiliary ones of the guide."""
        return tuple(site for site in self.sites if not site.is_auxiliary)

    @property
    def num_units(self) -> int:
        """Latents of one datum, all sites of the model together."""
        return sum(site.num_units for site in self.latents)

    @property
    def num_active(self) -> int:
        """Active units, all sites of the model together."""
        return sum(site.num_active for site in self.latents)

    @property
    def figures(self) -> dict[str, Figure | None]:
        """The parts of the ELBO by name, from "elbo" to "marginal_kl"."""
        return {name: getattr(self, name) for name in tables.PARTS}

    def table(self) -> str:
        """The ELBO taken apart, the sites, the units that cost most, and remarks, as plain text; nats."""
        place = f"mean over {self.num_data} data in {self.space}, sha256 {self.digest:.12}"
        return tables.table(self.figures, self.sites, self.remarks(), place)

    def remarks(self) -> list[str]:
        """What a reader must know beside the numbers."""
        return tables.remarks(self.figures, self.sites, self.skipped, self.num_data)

    def to_dict(self) -> dict[str, object]:
        """The figures as plain numbers; nats; None for no finite number."""
        return {
            "data": {"space": self.space, "n": self.num_data, "sha256": self.digest},
            "num_particles": self.num_particles,
            "num_draws": self.num_draws,
            "seed": self.seed,
            "num_units": self.num_units,
            "num_active": self.num_active,
            **finite({name: None if each is None else asdict(each) for name, each in self.figures.items()}),
            "skipped": self.skipped,
            "sites": [finite(site.to_dict()) for site in self.sites],
            "remarks": self.remarks(),
        }

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict` to `path`; no NaN or infinity is ever written."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")
        return Path(path)


def latent_use(
    model: nn.Module | Program,
    batch: Batch,
    *,
    guide: Program | None = None,
    num_particles: int = 64,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> LatentUse:
    r"""Active units, the KL divergence of each unit, and the ELBO taken apart, for continuous latents.

    A unit u is active if A_u = Var_x(E_q[u | x]) > 0.01. With the aggregate posterior q(z) = 1/N Σ_n q(z | x_n),

        ELBO = E log p(x | z) - KL,
        KL = 1/N Σ_n KL(q(z | x_n) || p(z)) = I_q(x; z) + KL(q(z) || p(z)),    I_q(x; z) <= log N.

    What is known in closed form is not estimated: the divergences of independent normals, and the means of the laws.
    q(z) costs N² evaluations of log q for each of at least two draws, so that a part of many data will do.

    Args:
        model: one of our models, or any Pyro model, as for `log_likelihood`.
        batch: observations, shape (n, ...), n >= 2, and the context if the model has one.
        guide: the guide of a Pyro model that is not one of ours.
        num_particles: draws of each datum, at least 2.
        seed: of the draws.
        device: as for `log_likelihood`.

    Returns:
        Nats per datum, with the Monte Carlo error for these data and the error over draws of the data.

    Raises:
        ValueError: no latent sites, discrete ones, fewer than two data or particles, a term that is not finite, or what
            `log_likelihood` refuses of a pair.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519; Hoffman, Johnson,
    "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016 (NeurIPS workshop).
    """
    traces.check_has_log_prob(model)
    space = checked_space(model, batch)
    for name, count in (("the number of data", len(batch)), ("num_particles", num_particles)):
        check_count(name, count, least=2)
    with prepared(model, batch, guide, device, seed) as (pair, args):
        tiled = not traces.broadcasts(pair, args)
        sites = find_sites(pair, args, tiled)
        terms = collect(pair, args, sites, num_particles, seed, tiled)
        skipped = why_not(pair, args, tiled)
        parts = None if skipped else mutual_information(terms, pair, args, sites, tiled)
    latents = [site for site in sites if not site.is_auxiliary]
    return LatentUse(
        sites=tuple(_site_use(site, terms.of[site.name]) for site in sites),
        elbo=_figure(terms.whole["elbo"]),
        reconstruction=_figure(terms.whole["log_likelihood"]),
        kl=_figure(terms.whole["kl"]),
        mutual_information=None if parts is None else _figure(parts[0]),
        marginal_kl=None if parts is None else _figure(parts[1]),
        skipped=skipped,
        num_data=len(batch),
        num_particles=num_particles,
        num_draws=0 if skipped else terms.num_draws,
        seed=seed,
        space="a space that is not stated" if space is None else str(space),
        digest=batch.digest,
        posterior_draws=_side_by_side(latents, terms, "draws"),
        prior_draws=_side_by_side(latents, terms, "prior_draws"),
    )


def _figure(moments: Tensor) -> Figure:
    """The mean over the data of (n, 2), values with their Monte Carlo variance."""
    values, variance = moments.double().T.numpy()
    return figure(values, variance)


def _site_use(site: Site, found: dict[str, Tensor]) -> SiteUse:
    variance, variance_se = unit_variance(found["mean"].numpy(), found["mean_variance"].numpy())
    kl = found["kl_per_unit"].numpy() if "kl_per_unit" in found else None
    return SiteUse(
        name=site.name,
        variance=variance,
        variance_se=variance_se,
        kl=_figure(found["kl"]),
        kl_per_unit=None if kl is None else kl.mean(0),
        kl_per_unit_se=None if kl is None else kl.std(0, ddof=1) / np.sqrt(len(kl)),
        reason=site.reason,
        prior=_one_normal(found),
        is_auxiliary=site.is_auxiliary,
    )


def _one_normal(found: dict[str, Tensor]) -> np.ndarray | None:
    """Mean and scale of p(u) of each unit, where they are those of every datum."""
    if "prior_loc" not in found:
        return None
    both = torch.stack([found["prior_loc"], found["prior_scale"]])  # (2, n, num_units)
    return both[:, 0].numpy() if torch.allclose(both, both[:, :1].expand_as(both)) else None


def _side_by_side(sites: list[Site], terms: Terms, which: str) -> np.ndarray:
    """Draws of all units, as many as there are of the prior; (m, units of all sites)."""
    count = terms.of[sites[0].name]["prior_draws"].shape[1]
    return torch.cat([terms.of[site.name][which][:, :count].flatten(0, 1) for site in sites], -1).numpy()
