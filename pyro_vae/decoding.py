"""Images to codes and back, for whatever has codes: a model's own `features` and `decode`, or continuous latents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae import traces
from pyro_vae.latents import Latents
from pyro_vae.spaces import Space
from pyro_vae.traces import Pair

GUIDE_DRAWS = 64  # whose mean is the code of an image
ROWS = 1024  # codes that are decoded together

Args = tuple[Tensor, ...]


@dataclass(frozen=True)
class Coder:
    """The way to codes and back, on the device of the arguments.

    Attributes:
        encode: from obs (n, ...) and perhaps context to codes (n, d): the mean of q(z | x), or what the model says.
        decode: from codes (n, d), and perhaps context (n, ...), to mean images (n, *shape) as `space.to_unit` has them.
        draw_prior: codes (num, d) of p(z), given the context of one datum (1, ...) if there is one; None without p(z).
    """

    encode: Callable[[Args], Tensor]
    decode: Callable[[Tensor, Args], Tensor]
    draw_prior: Callable[[int, Args], Tensor] | None


def coder_of(model: Any, pair: Pair, args: Args) -> Coder:
    """The coder of a model.

    A model may say itself: `features(obs, context=None)` gives codes (n, d), `decode(codes)` mean images in the unit
    range, and `prior()`, if there is one, p(z). Else codes are all continuous latents of the pair as one unconstrained
    vector, whose images are the means at the site "obs"; discrete latents are refused.

    Args:
        model: whose methods are looked for.
        pair: model and guide.
        args: of one datum or more.
    """
    if callable(getattr(model, "features", None)) and callable(getattr(model, "decode", None)):
        prior = getattr(model, "prior", None)
        draw = None if prior is None else lambda num, context: prior(*context).sample((num,)).reshape(num, -1)
        return Coder(lambda some: model.features(*some), lambda codes, context: model.decode(codes, *context), draw)
    few = tuple(arg[:1].repeat(2, *[1] * (arg.ndim - 1)) for arg in args)
    return _of_latents(getattr(model, "space", None), pair, few)


def _of_latents(space: Space | None, pair: Pair, few: Args) -> Coder:
    latents, template = Latents(pair, few, tiled=True), few[0][:1]
    if not latents.sites or latents.num_states > 1:
        found = "no latents" if latents.num_states == 1 else f"discrete latents with {latents.num_states} joint states"
        raise ValueError(f"codes are continuous latents, or methods `features` and `decode`; this model has {found}")

    def decode(codes: Tensor, context: Args) -> Tensor:
        rows = (template.expand(len(codes), *template.shape[1:]), *context)
        mean = traces.observation_at(pair, rows, latents.unpack(codes.unsqueeze(0))[0], 1, tiled=True).mean
        return mean if space is None else space.to_unit(mean)

    def draw_prior(num: int, context: Args) -> Tensor:
        return latents.draw_prior((template, *context), num)[:, 0]

    return Coder(lambda some: latents.draw_guide(some, GUIDE_DRAWS).mean(0), decode, draw_prior)


def decoded(coder: Coder, codes: Tensor, context: Args) -> Tensor:
    """Mean images of any number of codes (n, d), all with the context of one datum (1, ...)."""
    parts = []
    for some in codes.split(ROWS):
        parts.append(coder.decode(some, tuple(each.expand(len(some), *each.shape[1:]) for each in context)))
    return torch.cat(parts)
