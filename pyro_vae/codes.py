"""`features`: the code that a model gives to an observation, such as a classifier may work on."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import models, traces
from pyro_vae.checks import check_count
from pyro_vae.data import Batch
from pyro_vae.estimators.evaluate import checked_space, prepared
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.traces import Pair, Program

ROWS = 4096  # draws of data in one block
TRIED = 3  # draws of each datum by which it is found out whether a mean is known
NO_MEAN = (NotImplementedError, AttributeError)  # of a law that cannot tell its mean


def features(
    model: nn.Module | Program,
    obs: Batch | Tensor,
    *,
    guide: Program | None = None,
    sites: Sequence[str] | None = None,
    num_draws: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Tensor:
    r"""The code of each datum, as a model sees it.

    - A model with the method `features(obs, context=None)` says itself what its codes are: an autoencoder's code e(x),
      the posterior mean E[z | x] of PPCA in closed form, the responsibilities p(k | x) of a mixture.
    - For any other pair it is the mean of the guide, E_q[z | x]: of every latent site of the model in the order of the
      guide, side by side (a ladder of z1, z2: both), or of those named by `sites`. Where the law of a site tells its
      mean and is the same whatever else is drawn (the mean field of a VAE) that is exact. Elsewhere (flows, upper
      layers of a ladder) it is the mean over `num_draws` draws z_k, of E_q[z | x, what the guide drew before z] if the
      law tells it and else of the z_k themselves.

    Parameters, buffers, train/eval mode and the global random state are left as they were.

    Args:
        model: one of our models, or any Pyro model with its guide.
        obs: observations (n, ...), or a batch of them, with the context if the model has one.
        guide: the guide of a Pyro model that is not one of ours.
        sites: names of latent sites, all of the model's if None.
        num_draws: of each datum, where the mean is not known.
        seed: of these draws; where the mean is known nothing is drawn.
        device: where to compute; a GPU if there is one.

    Returns:
        Shape (n, code_dim), on the CPU, in the precision of the model.

    Raises:
        ValueError: the model has no codes, or no such site; a code is not finite; or the data do not suit the model.
    """
    batch = obs if isinstance(obs, Batch) else Batch(obs)
    check_count("num_draws", num_draws)
    check_has_codes(model)
    checked_space(model, batch)
    own: Any = getattr(model, "features", None)
    with prepared(model, batch, guide, device, seed) as (pair, args):
        if callable(own):
            if sites is not None:
                raise ValueError(f"sites are for codes by a guide; those of {type(model).__name__} are its own")
            codes = torch.cat([own(*part).flatten(1) for _, part in _blocks(args, ROWS)])
        else:
            codes = _guide_mean(pair, args, _chosen(model, pair, args, sites), num_draws, seed)
    bad = (~codes.isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(f"the code of datum {int(bad[0])} is not finite")
    return codes.cpu()


def _blocks(args: tuple[Tensor, ...], num_rows: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    for start in range(0, len(args[0]), num_rows):
        yield start, tuple(arg[start : start + num_rows] for arg in args)


def _chosen(model: object, pair: Pair, args: tuple[Tensor, ...], sites: Sequence[str] | None) -> list[str]:
    """The latent sites whose means are wanted, in the order of the guide or as they were named."""
    few = tuple(arg[:2] for arg in args)
    if not traces.matching_sites(pair, few):
        name = type(model).__name__ if isinstance(model, nn.Module) else "the model"
        raise ValueError(f"{name} has no codes: it has no latent sites; {', '.join(with_codes())} have some")
    values, _ = traces.draw_latents(pair, few, 1, tiled=True)
    auxiliary = traces.auxiliary_sites(pair, few)
    known = [name for name in values if name not in auxiliary]
    unknown = [name for name in sites or () if name not in known]
    if unknown or (sites is not None and not sites):
        raise ValueError(f"sites must be some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return list(sites or known)


def with_codes() -> list[str]:
    """The models of models/ with codes, as far as their classes tell: by a method `features`, or by latents."""
    classes = {name: getattr(models, name) for name in models.listing().values()}
    return [name for name, cls in classes.items() if hasattr(cls, "features") or _has_latents(cls)]


def check_has_codes(model: object) -> None:
    """Raise a ValueError for a model whose class says in `no_codes` why its latents are none."""
    if reason := getattr(model, "no_codes", None):
        raise ValueError(f"{type(model).__name__} has no codes: {reason}; {', '.join(with_codes())} have some")


def _has_latents(cls: type) -> bool:
    has_latents = not {"latent_dim", "latent_dims"}.isdisjoint(inspect.signature(cls).parameters)
    return has_latents and getattr(cls, "no_codes", None) is None


def _guide_mean(pair: Pair, args: tuple[Tensor, ...], sites: list[str], num_draws: int, seed: int) -> Tensor:
    """E_q[z | x] of these sites side by side, (n, units of all)."""
    tiled = not traces.broadcasts(pair, args, with_density=False)
    few = tuple(arg[:2] for arg in args)
    reseed(seed, args[0].device)
    is_known = all(_same(means) for means in _means(pair, few, sites, TRIED, tiled))
    count = 1 if is_known else num_draws
    parts = []
    for start, part in _blocks(args, max(1, ROWS // count)):
        reseed(derived_seed(seed, start), args[0].device)
        parts.append(torch.cat([means.mean(0) for means in _means(pair, part, sites, count, tiled)], -1))
    return torch.cat(parts)


def _means(pair: Pair, args: tuple[Tensor, ...], sites: list[str], num_draws: int, tiled: bool) -> list[Tensor]:
    """E[z | x, what was drawn before z] of each site at draws of the guide, or the draws; (num_draws, n, units)."""
    laws: dict[str, Any] = {}

    def keep(name: str, law: Any) -> Any:
        laws[name] = law
        return law

    kept = Pair(pair.model, traces.with_laws(pair.guide, keep), pair)
    values, _ = traces.draw_latents(kept, args, num_draws, tiled)
    return [_rows(name, laws[name], values[name], num_draws, tiled) for name in sites]


def _rows(name: str, law: Any, value: Tensor, num_draws: int, tiled: bool) -> Tensor:
    """The mean of a law, or what was drawn from it, as (num_draws, n, units); plates left of the data become units."""
    try:
        found = law.mean.expand(value.shape)
    except NO_MEAN:
        found = value
    if not bool(found.isfinite().all()):
        if law.support.is_discrete:
            raise ValueError(f"site {name!r} is discrete and has no mean that could be a code ({type(law).__name__})")
        found = value
    num_left = value.ndim - law.event_dim - (1 if tiled else 2)
    num_units = math.prod((*value.shape[:num_left], *law.event_shape))
    return found.movedim(num_left, 0).reshape(num_draws, -1, num_units)


def _same(means: Tensor) -> bool:
    """Whether all draws (num_draws, n, units) have the same numbers."""
    return torch.allclose(means, means[:1].expand_as(means), rtol=1e-5, atol=1e-7)
