"""Outlier scores by name, higher for what is less like the training data; figures of images, never of a whole set."""

import bz2
import lzma
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae import traces
from pyro_vae.checks import check_choice
from pyro_vae.codes import check_has_codes
from pyro_vae.comparison import refuse_unlike
from pyro_vae.data import Batch, Data
from pyro_vae.decoding import coder_of
from pyro_vae.estimators.estimate import Estimator
from pyro_vae.estimators.evaluate import log_likelihood, prepared
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.spaces import Binary, Quadrants, Quantized, Real, Space
from pyro_vae.traces import Program
from pyro_vae.uses import SCORES

BY_LOG_PROB = {"log_prob", "typicality", "ratio", "complexity"}
PARTICLES = 64  # draws of the guide for the terms of the ELBO
ROWS = 32  # data whose particles are run together
LOG_PROB, BACKGROUND, REFERENCE, TERMS = range(41, 45)  # streams of the seed


@dataclass(frozen=True)
class Scorer:
    r"""A fitted model with what its scores need, called on a batch.

    log_prob: -log p(x), nats. A low density is no proof: flat images, whose pixels hide in the mode of p(x), score low.
    typicality: |log p(x) - m|, m the mean over `reference`, nats: too likely is as odd as too unlikely.
    ratio: log p_0(x) - log p(x), nats, p_0 a background model, for instance of `mutated` data: what both explain, as a
        black margin, cancels.
    complexity: -log p(x) - L(x), nats, L the length of the image behind a general compressor: simple images, which any
        model finds likely, lose what they gain by it.
    elbo: -ELBO(x), nats, by 64 draws of the guide; a bound, at what the guide makes of images unlike any that it saw.
    kl: E_q log q(z | x)/p(z), nats: how much the code has to say of the image.
    reconstruction: ‖x - E[x | z]‖², z the mean code, summed over pixels in the unit range.

    Args:
        model: fitted; one of our models or a Pyro model as for `log_likelihood`.
        guide: of a Pyro model that is not one of ours.
        estimator: of log p, of the background's and of the reference's too; see `log_likelihood`, which replaces one
            that does not apply to a model without latents.
        background: p_0, a model in the same space.
        reference: data whose mean log p is typical, for example `data.valid`: not those that p-values are calibrated
            on, which would have a hand in their own scores.
        seed: of everything random; the noise also depends on the digest of the batch, so that two batches share none.
        device: where to compute.
        progress: show a progress bar of estimates of log p.

    Source: Ren et al., "Likelihood ratios for out-of-distribution detection", 2019, arXiv:1906.02845; Nalisnick et al.,
    "Do deep generative models know what they don't know?", 2019, arXiv:1810.09136, and "Detecting out-of-distribution
    inputs to deep generative models using typicality", 2019, arXiv:1906.02994; Serrà et al., "Input complexity and
    out-of-distribution detection with likelihood-based generative models", 2020, arXiv:1909.11480.
    """

    model: nn.Module | Program
    guide: Program | None = None
    estimator: Estimator | None = None
    background: nn.Module | None = None
    reference: Batch | None = None
    seed: int = 0
    device: str | torch.device | None = None
    progress: bool = False

    def __call__(
        self, batch: Batch, names: Sequence[str] = ("log_prob",), result: LogLikelihood | None = None
    ) -> dict[str, np.ndarray]:
        """The scores asked for, {name: (n,)}, from `result` if log p is known.

        No datum's score has to do with the other data of its batch but through the noise of the estimates, which is
        independent from datum to datum, and from batch to batch.

        Raises:
            ValueError: an unknown name; a ratio without `background`; a typicality without `reference`; a model
                without latents asked for terms of the ELBO, or without codes for a KL or a reconstruction.
        """
        for name in names:
            check_choice("score", name, SCORES)
        if {"kl", "reconstruction"} & set(names):
            check_has_codes(self.model)
        if "ratio" in names and self.background is None:
            raise ValueError("the score 'ratio' needs a background model: background=...")
        found: dict[str, np.ndarray] = {}
        if set(names) & BY_LOG_PROB:
            found |= self._by_log_prob(result or self.log_prob(batch), batch, names)
        if {"elbo", "kl"} & set(names):
            found |= self._terms(batch)
        if "reconstruction" in names:
            found["reconstruction"] = self._reconstruction(batch)
        return {name: found[name] for name in names}

    def log_prob(self, batch: Batch) -> LogLikelihood:
        """Log p of the batch, given its context if there is one."""
        return self._score(self.model, batch, LOG_PROB, self.guide)

    @cached_property
    def _typical(self) -> float:
        """Mean log p over `reference`, nats, estimated once for all batches."""
        if self.reference is None:
            raise ValueError("the score 'typicality' needs data whose log p is typical: reference=data.valid")
        return self._score(self.model, self.reference, REFERENCE, self.guide).mean

    def _by_log_prob(self, result: LogLikelihood, batch: Batch, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Those of the scores that rest on log p."""
        surprise = -result.log_prob
        found = {"log_prob": surprise}
        if "typicality" in names:
            found["typicality"] = np.abs(surprise + self._typical)  # |m - log p|
        if "ratio" in names and self.background is not None:
            other = self._score(self.background, batch, BACKGROUND, None)
            refuse_unlike("the model", result, "the background", other)
            found["ratio"] = surprise + other.log_prob
        if "complexity" in names:
            found["complexity"] = surprise - compressed_lengths(batch.obs, batch.space or result.space)
        return found

    def _score(self, model: nn.Module | Program, batch: Batch, stream: int, guide: Program | None) -> LogLikelihood:
        return log_likelihood(
            model,
            batch,
            guide=guide,
            estimator=self.estimator,
            seed=self._own_seed(batch, stream),
            device=self.device,
            marginal=False,
            progress=self.progress,
        )

    def _own_seed(self, batch: Batch, *stream: int) -> int:
        """A seed for these data: by position alone, datum i of two batches would be scored with the same draws."""
        return derived_seed(self.seed, int(batch.digest[:16], 16), *stream)

    def _terms(self, batch: Batch) -> dict[str, np.ndarray]:
        """-ELBO and KL of each datum."""
        elbo, kl, seed = [], [], self._own_seed(batch, TERMS)
        with prepared(self.model, batch, self.guide, self.device, self.seed) as (pair, args):
            if not traces.matching_sites(pair, tuple(arg[:2] for arg in args)):
                raise ValueError("the scores 'elbo' and 'kl' need latents, and this model has none")
            tiled = not traces.broadcasts(pair, args, with_density=False)
            for start in range(0, len(args[0]), ROWS):
                reseed(derived_seed(seed, start), args[0].device)
                some = tuple(arg[start : start + ROWS] for arg in args)
                values, log_q = traces.draw_latents(pair, some, PARTICLES, tiled)
                log_prior, log_likely = traces.log_prior_and_likelihood(pair, some, values, PARTICLES, tiled)
                kl.append((log_q - log_prior).mean(0))
                elbo.append((log_prior + log_likely - log_q).mean(0))
        return {"elbo": -torch.cat(elbo).cpu().numpy(), "kl": torch.cat(kl).cpu().numpy()}

    def _reconstruction(self, batch: Batch) -> np.ndarray:
        """Squared error of each datum's reconstruction."""
        space = batch.space or getattr(self.model, "space", None)
        unit = (lambda values: values) if space is None else space.to_unit
        errors, seed = [], self._own_seed(batch, TERMS, 1)
        with prepared(self.model, batch, self.guide, self.device, self.seed) as (pair, args):
            coder = coder_of(self.model, pair, args)
            for start in range(0, len(args[0]), ROWS):
                reseed(derived_seed(seed, start), args[0].device)
                some = tuple(arg[start : start + ROWS] for arg in args)
                back = coder.decode(coder.encode(some), some[1:])
                errors.append((unit(some[0]) - back).double().flatten(1).square().sum(1))
        return torch.cat(errors).cpu().numpy()


def compressed_lengths(obs: Tensor, space: Space) -> np.ndarray:
    """Length of each image as the shortest of zlib, bz2 and lzma makes it, in nats (8 log 2 for a byte); (n,).

    Bits are packed eight to a byte, grey levels are bytes; dequantised reals are cut back to their levels.
    """
    rows = _bytes(obs.flatten(1).cpu(), space)
    # A dictionary as long as the image (4 KiB is lzma's least): to clear the 64 MiB of preset 9 takes 80 ms an image.
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, rows.shape[1])}
    ways: tuple[Callable[[bytes], bytes], ...] = (
        lambda raw: zlib.compress(raw, 9),
        lambda raw: bz2.compress(raw, 9),
        lambda raw: lzma.compress(raw, lzma.FORMAT_RAW, filters=[lzma2]),
    )
    shortest = [min(len(way(row.tobytes())) for way in ways) for row in rows]
    return np.array(shortest, dtype=np.float64) * 8 * math.log(2)


def _bytes(rows: Tensor, space: Space) -> np.ndarray:
    if isinstance(space, Binary):
        return np.packbits(rows.numpy().astype(bool), axis=1)
    levels = getattr(space, "levels", None)
    if levels is None or levels > 256:
        raise ValueError(f"the score 'complexity' needs bits or at most 256 grey levels to be compressed, got {space}")
    values = rows if isinstance(space, Quantized) else (rows * levels).floor()
    return values.clamp(0, levels - 1).numpy().astype(np.uint8)


def mutated(data: Data, rate: float = 0.1, seed: int = 0) -> Data:
    """The same data, but each pixel of training and validation images is, with probability `rate`, a uniform one.

    What is left is the background: a model fitted to it knows the statistics of single pixels and little of what an
    image shows. Test data stay as they are.

    Args:
        data: of bits, grey levels, or reals that came from grey levels; of whole images, without given quadrants.
        rate: 0.1 to 0.3 in Ren et al.
        seed: of the mutations.

    Source: Ren et al., "Likelihood ratios for out-of-distribution detection", 2019, arXiv:1906.02845.
    """
    if isinstance(data.context, Quadrants):
        raise ValueError(f"mutations are of whole images, and these data are given {data.context}: mutate them before")
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie between 0 and 1, got {rate}")
    if isinstance(data.space, Real) and data.space.levels is None:
        raise ValueError("mutations are uniform over grey levels, and these reals came from none")
    generator = torch.Generator().manual_seed(seed)

    def change(values: Tensor, of: Space) -> Tensor:
        fresh = torch.rand(values.shape, generator=generator)
        if not isinstance(of, Real):
            fresh = (fresh * (of.levels if isinstance(of, Quantized) else 2)).floor()
        return torch.where(torch.rand(values.shape, generator=generator) < rate, fresh, values)

    train, valid = (replace(batch, obs=change(batch.obs, data.space)) for batch in (data.train, data.valid))
    intensity = None
    if data.intensity is not None:  # each epoch draws bits: of a mutated pixel, fair ones
        hit = torch.rand(data.intensity.shape, generator=generator) < rate
        intensity = torch.where(hit, torch.full_like(data.intensity, 0.5), data.intensity)
    return replace(data, name=f"{data.name}, mutated", train=train, valid=valid, intensity=intensity)
