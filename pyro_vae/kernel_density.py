"""The kernel density estimate of log p(x) from samples of a model, which is here to show how far off it is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.checks import check_number

ROWS = 256  # of the data that are scored at once
SCALES = tuple(10 ** (-2 + step / 10) for step in range(21))  # 0.01 to 1, in units of the data


class ParzenWindow(NamedTuple):
    """Log densities (n,) of the data, nats, float64, and the bandwidth that was chosen, in units of the data.

    Attributes:
        is_at_end: whether it is the smallest or the largest of several, so that one beyond may suit the data better.
    """

    log_density: Tensor
    bandwidth: float
    is_at_end: bool


@torch.no_grad()
def parzen_window(samples: Tensor, valid: Tensor, test: Tensor, bandwidths: Sequence[float] = SCALES) -> ParzenWindow:
    r"""Score data by a mixture of normals around samples, log 1/S Σ_s N(x; x_s, h² I), the way GANs once were scored.

    The bandwidth h is the one of `bandwidths` under which the validation data are most probable. The estimate is a
    density, of a model of its own: it says little of the one that drew the samples. In 784 dimensions any feasible
    number of samples leaves a test image far from all of them, h has to bridge that distance, and the result is low by
    hundreds of nats, by an amount that differs from model to model. Do not compare models by it.

    Args:
        samples: draws of a model (S, *shape); of a GAN or VAE commonly the means of p(x | z), without its noise.
        valid: data that choose h, (m, *shape).
        test: data that are scored, (n, *shape).
        bandwidths: what h is chosen from, in units of the data.

    Raises:
        ValueError: unlike shapes, no rows, or a bandwidth that is not positive.

    Source: Goodfellow et al., "Generative adversarial nets", 2014, arXiv:1406.2661; Theis, van den Oord, Bethge, "A
    note on the evaluation of generative models", 2016, arXiv:1511.01844; Wu, Burda, Salakhutdinov, Grosse, 2017,
    arXiv:1611.04273.
    """
    for name, rows in (("samples", samples), ("valid", valid), ("test", test)):
        if rows.ndim < 2 or rows.shape[1:] != samples.shape[1:] or len(rows) == 0:
            shape = tuple(samples.shape[1:])
            raise ValueError(f"{name} must hold rows of shape {shape}, as samples do, got {tuple(rows.shape)}")
    if not bandwidths:
        raise ValueError("bandwidths must hold at least one, got none")
    for bandwidth in bandwidths:
        check_number("bandwidth", bandwidth, above=0)
    scored = _log_densities(samples, valid, bandwidths).mean(1)
    best = bandwidths[int(scored.argmax())]
    is_at_end = len(bandwidths) > 1 and best in (min(bandwidths), max(bandwidths))
    return ParzenWindow(_log_densities(samples, test, (best,))[0], best, is_at_end)


def _log_densities(samples: Tensor, obs: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Log density of each row under each bandwidth, (len(bandwidths), n), nats.

    In float64, as squared distances are small differences of large numbers.
    """
    centers = samples.flatten(1).double()
    num, dims = centers.shape
    norms = [math.log(num) + dims * (math.log(h) + math.log(2 * math.pi) / 2) for h in bandwidths]
    parts = []
    for rows in obs.flatten(1).double().split(ROWS):
        squares = torch.cdist(rows, centers).square_()
        each = zip(bandwidths, norms, strict=True)
        parts.append(torch.stack([(squares / (-2 * h**2)).logsumexp(1) - norm for h, norm in each]))
    return torch.cat(parts, 1)
