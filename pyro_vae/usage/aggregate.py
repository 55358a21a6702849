"""The aggregate posterior q(z) of a set of data, and the share of the KL divergence that tells the data apart."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vae import traces
from pyro_vae.traces import Pair
from pyro_vae.usage.sites import Site

BLOCK_NUMBERS = {"cpu": 2**22, "cuda": 2**27}  # of latents (or, on tiled data, of observations) held at once
SPREAD = 100  # data, evenly over all of them, whose priors are compared


def why_not(pair: Pair, args: tuple[Tensor, ...], tiled: bool) -> str | None:
    """Why KL(q(z) || p(z)) cannot be had, or None: it takes log q(z | x) at any z, and one p(z) for all data."""
    try:
        traces.check_density(pair, args, "the mutual information", "do without it")
    except ValueError as error:
        return str(error)
    if not _one_prior(pair, args, tiled):
        return "the model gives the latents another law for each datum, so there is no p(z) to compare q(z) with"
    return None


def _one_prior(pair: Pair, args: tuple[Tensor, ...], tiled: bool) -> bool:
    """Whether log p(z) stays the same when each datum gets the draws of its neighbour."""
    some = tuple(arg[:: max(1, len(arg) // SPREAD)][:SPREAD] for arg in args)
    values, _ = traces.draw_latents(pair, some, 1, tiled)
    there, _ = traces.log_prior_and_likelihood(pair, some, values, 1, tiled)
    elsewhere, _ = traces.log_prior_and_likelihood(pair, tuple(arg.roll(1, 0) for arg in some), values, 1, tiled)
    return torch.allclose(there, elsewhere, rtol=1e-4, atol=1e-3)


def log_aggregate(
    pair: Pair, args: tuple[Tensor, ...], sites: Sequence[Site], rows: Mapping[str, Tensor], tiled: bool
) -> Tensor:
    r"""Log q(z), q(z) = 1/N Σ_n q(z | x_n), at any z.

    Every datum is encoded once, and its law asked for all z together.

    Args:
        pair: model and guide, with a density.
        args: obs (N, ...) and, if the model has one, context.
        sites: the latent sites.
        rows: the z, {site: (num_draws, num_units)}.
        tiled: how the programs are run, see `traces.log_weights`.

    Returns:
        Shape (num_draws,), nats.
    """
    num_draws, num_data = len(rows[sites[0].name]), len(args[0])
    per_datum = num_draws * max(sum(site.num_units for site in sites), args[0][0].numel() if tiled else 0)
    step = max(1, BLOCK_NUMBERS.get(args[0].device.type, BLOCK_NUMBERS["cpu"]) // per_datum)
    total = torch.full((num_draws,), -math.inf, dtype=torch.float64, device=args[0].device)
    for start in range(0, num_data, step):
        some = tuple(arg[start : start + step] for arg in args)
        values = {site.name: site.value(rows[site.name][:, None].expand(-1, len(some[0]), -1), tiled) for site in sites}
        log_q = traces.log_density(pair.guide, some, values, num_draws, tiled)  # (num_draws, data of the block)
        total = torch.logaddexp(total, log_q.logsumexp(1))
    return total - math.log(num_data)
