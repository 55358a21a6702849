"""A law with its variance multiplied: the same family, the same centre, heavier at every distance."""

import math
from typing import Any

import pyro.distributions as dist
import torch

WIDENED = "Normal, StudentT, Laplace, Cauchy, MultivariateNormal, LowRankMultivariateNormal"


def widen(law: Any, factor: float, site: str = "z") -> Any:
    """The law with its variance times `factor`.

    Independent and expanded laws are widened inside. A mixture keeps its weights and centres, and each of its
    components is widened; so is the base of a transformed law (a log-normal, a flow), whose own variance then grows by
    some other factor. Discrete laws stay as they are.

    Args:
        law: a Pyro or torch distribution.
        factor: of the variance, positive.
        site: name of the site, for the message.

    Raises:
        ValueError: for a law that it cannot widen.
    """
    widened = _structured(law, factor, site)
    if widened is None:
        widened = _plain(law, factor)
    if widened is None:
        raise ValueError(
            f"the law {type(law).__name__} at site {site!r} of the guide cannot be widened; known are {WIDENED}, "
            "mixtures of them and transformed ones; use refined() or plain importance sampling"
        )
    return widened


def _structured(law: Any, factor: float, site: str) -> Any:
    """A law that is built of others, which are widened in its place; None for any other law."""
    if isinstance(law, torch.distributions.Independent):
        return dist.Independent(widen(law.base_dist, factor, site), law.reinterpreted_batch_ndims)
    if isinstance(law, dist.ExpandedDistribution):
        return widen(law.base_dist, factor, site).expand(law.batch_shape)
    if isinstance(law, torch.distributions.TransformedDistribution):
        return dist.TransformedDistribution(widen(law.base_dist, factor, site), law.transforms, validate_args=False)
    if isinstance(law, torch.distributions.MixtureSameFamily):
        parts = widen(law.component_distribution, factor, site)
        return dist.MixtureSameFamily(law.mixture_distribution, parts, validate_args=False)
    return None


def _plain(law: Any, factor: float) -> Any:
    root = math.sqrt(factor)
    if isinstance(law, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(law.loc, scale_tril=root * law.scale_tril, validate_args=False)
    if isinstance(law, torch.distributions.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(
            law.loc, root * law.cov_factor, factor * law.cov_diag, validate_args=False
        )
    if isinstance(law, dist.MixtureOfDiagNormals):
        return type(law)(law.locs, root * law.coord_scale, law.component_logits)
    if isinstance(law, torch.distributions.StudentT):
        return dist.StudentT(law.df, law.loc, root * law.scale, validate_args=False)
    for name in ("Normal", "Laplace", "Cauchy"):
        if isinstance(law, getattr(torch.distributions, name)):
            return getattr(dist, name)(law.loc, root * law.scale, validate_args=False)
    return law if _is_discrete(law) else None


def _is_discrete(law: Any) -> bool:
    try:
        return bool(law.support.is_discrete)
    except NotImplementedError:  # a law that does not tell its support
        return False
