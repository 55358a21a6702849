"""What the codes of a model mean: images along one latent at a time, and on the way from one image to another."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.checks import check_choice, check_count
from pyro_vae.codes import check_has_codes
from pyro_vae.data import Batch
from pyro_vae.decoding import Args, Coder, coder_of, decoded
from pyro_vae.estimators.evaluate import checked_space, prepared
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.traces import Program
from pyro_vae.usage.latent_use import latent_use
from pyro_vae.uses import WAYS

PRIOR_DRAWS = 4096  # of which the quantiles of each latent are taken
QUANTILES = (0.01, 0.99)  # between which a traversal goes
PRIOR, CODES = 51, 52  # streams of the seed


@dataclass(frozen=True, eq=False, repr=False)
class Traversal:
    """Images E[x | z] as one latent goes through its values and all others stay.

    Attributes:
        units: which latents, the most used first, shape (num_units,).
        used: how much of each: see `kind`.
        kind: "KL, nats" where KL(q(z_j | x) || p(z_j)), a mean over the data, is known in closed form, else
            "variance of the code", Var_x E[z_j | x].
        values: of each latent, shape (num_units, num_steps).
        images: shape (num_units, num_steps, *shape), as `space.to_unit` has them.
    """

    units: np.ndarray
    used: np.ndarray
    kind: str
    values: np.ndarray
    images: Tensor

    def __repr__(self) -> str:
        return f"Traversal({len(self.units)} latents, {self.values.shape[1]} values of each, by {self.kind})"


def traverse(
    model: nn.Module | Program,
    batch: Batch,
    *,
    guide: Program | None = None,
    around: int | None = None,
    num_units: int | None = None,
    num_steps: int = 9,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Traversal:
    r"""Latent traversals: z_j goes through quantiles of its prior from .01 to .99, all other latents stay at a base.

    Args:
        model: a model with continuous latents, or with methods `features(obs, context=None)`, its codes, and
            `decode(codes)`, their images in the unit range, as PPCA and autoencoders have them.
        batch: data by which the latents are ordered; its context, if there is one, stays that of the base.
        guide: of a Pyro model that is not one of ours.
        around: index of the datum whose code is the base, of a model that has codes; None for the mean of p(z), or of
            the codes where there is no p(z), and then for the context of the first datum.
        num_units: how many latents, the most used first; all if None.
        num_steps: images of each latent.
        seed: of the draws.
        device: where to compute; a GPU if there is one.

    Returns:
        The images and what they belong to; where there is no p(z), quantiles are those of the codes of the data.

    Source: Higgins et al., "beta-VAE", 2017 (ICLR).
    """
    check_count("num_steps", num_steps, least=2)
    checked_space(model, batch)
    _check_index("around", around, len(batch))
    if around is not None:
        check_has_codes(model)
    with prepared(model, batch, guide, device, seed) as (pair, args):
        coder = coder_of(model, pair, args)
        reseed(derived_seed(seed, CODES), args[0].device)
        codes = coder.encode(args)
        context = tuple(arg[around or 0 : (around or 0) + 1] for arg in args[1:])
        law = _law(coder, context, codes, seed)
        base = law.mean(0) if around is None else codes[around]
        used, kind = _use(model, batch, guide, codes, seed, device)
        order = np.argsort(-used, kind="stable")[:num_units]
        levels = torch.linspace(*QUANTILES, num_steps, dtype=law.dtype, device=law.device)
        values = torch.quantile(law[:, torch.from_numpy(order).to(law.device)], levels, dim=0).T  # (units, steps)
        points = base.expand(*values.shape, -1).clone()
        for row, unit in enumerate(order.tolist()):
            points[row, :, unit] = values[row]
        images = decoded(coder, points.flatten(0, 1), context).unflatten(0, values.shape).cpu()
    return Traversal(order, used[order], kind, values.cpu().numpy(), images)


def interpolate(
    model: nn.Module | Program,
    batch: Batch,
    start: int,
    stop: int,
    *,
    guide: Program | None = None,
    way: str = "spherical",
    num_steps: int = 9,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Tensor:
    r"""Mean images E[x | z] at codes on the way from one datum's to another's, both ends included.

    linear: (1 - t) a + t b. spherical: sin((1 - t) ω)/sin ω a + sin(t ω)/sin ω b, ω the angle between a and b, which
    keeps to the norms that codes of a normal prior in many dimensions have; in one dimension it is linear.

    Args:
        model: as for `traverse`.
        batch: data; a context is that of the start.
        start: index of the first datum.
        stop: of the last.
        guide: of a Pyro model that is not one of ours.
        way: "spherical" or "linear".
        num_steps: images in all.
        seed: of the draws that the codes are means of.
        device: where to compute; a GPU if there is one.

    Returns:
        Images (num_steps, *shape), as `space.to_unit` has them.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985; White, "Sampling generative networks", 2016,
    arXiv:1609.04468.
    """
    check_choice("way", way, WAYS)
    check_has_codes(model)
    check_count("num_steps", num_steps, least=2)
    checked_space(model, batch)
    for name, index in (("start", start), ("stop", stop)):
        _check_index(name, index, len(batch))
    with prepared(model, batch, guide, device, seed) as (pair, args):
        coder = coder_of(model, pair, args)
        reseed(derived_seed(seed, CODES), args[0].device)
        ends = torch.tensor([start, stop])
        first, last = coder.encode(tuple(arg[ends.to(arg.device)] for arg in args))
        t = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)[:, None]
        points = slerp(first, last, t) if way == "spherical" else torch.lerp(first, last, t)
        return decoded(coder, points, tuple(arg[start : start + 1] for arg in args[1:])).cpu()


def slerp(first: Tensor, last: Tensor, t: Tensor) -> Tensor:
    """Points between two vectors (d,) at times t (n, 1), along the arc between them; linear where there is none."""
    cosine = torch.dot(first, last) / (first.norm() * last.norm())
    angle = cosine.clamp(-1, 1).acos()
    if not bool(angle.sin() > 1e-4):  # on one line, or a vector of zeros
        return torch.lerp(first, last, t)
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * last) / angle.sin()


def _law(coder: Coder, context: Args, codes: Tensor, seed: int) -> Tensor:
    """Draws of p(z), or the codes of the data where there is none; (num, d)."""
    if coder.draw_prior is None:
        return codes
    reseed(derived_seed(seed, PRIOR), codes.device)
    return coder.draw_prior(PRIOR_DRAWS, context)


def _use(
    model: nn.Module | Program,
    batch: Batch,
    guide: Program | None,
    codes: Tensor,
    seed: int,
    device: str | torch.device | None,
) -> tuple[np.ndarray, str]:
    """How much each latent is used, (d,), and by what measure."""
    variance = codes.double().var(0, correction=0).cpu().numpy()
    if callable(getattr(model, "decode", None)):
        return variance, "variance of the code"
    sites = latent_use(model, batch, guide=guide, num_particles=2, seed=seed, device=device).latents
    per_unit = [site.kl_per_unit for site in sites]
    if len(sites) == 1 and per_unit[0] is not None and len(per_unit[0]) == len(variance):
        return np.asarray(per_unit[0]), "KL, nats"
    return variance, "variance of the code"


def _check_index(name: str, index: int | None, num: int) -> None:
    if index is not None and not 0 <= index < num:
        raise ValueError(f"{name} must be the index of a datum, from 0 to {num - 1}, got {index}")
