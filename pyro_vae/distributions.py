"""Observation distributions that Pyro lacks: laws cut into grey levels, and mixtures of laws of whole images."""

import math
from typing import Protocol

import torch
from pyro.distributions import Categorical, TorchDistribution
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, constraints
from torch.nn.functional import embedding_bag, logsigmoid, softplus

Shape = torch.Size | list[int] | tuple[int, ...]


def log_interval_logistic(low: Tensor, high: Tensor) -> Tensor:
    r"""Log of σ(high) - σ(low), stable in both tails: log σ(high) + log σ(-low) + log(1 - exp(low - high))."""
    return logsigmoid(high) + logsigmoid(-low) + torch.log(-torch.expm1(low - high))


def log_interval_normal(low: Tensor, high: Tensor) -> Tensor:
    r"""Log of Φ(high) - Φ(low); an interval right of 0 is mirrored, so that no digits cancel."""
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_low - log_high))


class _Discretized(TorchDistribution):
    """A continuous law Y cut into the levels 0..L-1 by rounding; all that lies beyond falls to the end levels."""

    arg_constraints = {"loc": pyro_constraints.real, "scale": pyro_constraints.positive}  # noqa: RUF012 (as every law of torch has it)
    has_enumerate_support = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "_Discretized":
        return type(self)(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        low = (value - 0.5 - self.loc) / self.scale
        high = (value + 0.5 - self.loc) / self.scale
        low = torch.where(value <= 0, torch.full_like(low, -OPEN), low)
        high = torch.where(value >= self.levels - 1, torch.full_like(high, OPEN), high)
        return self._log_interval(low, high)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            draw = self.loc + self.scale * self._standard(shape)
            return draw.round().clamp(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """E X = Σ_{l >= 1} P(X >= l)."""
        return torch.stack([self._above(level - 0.5) for level in range(1, self.levels)]).sum(0)

    def _above(self, threshold: float) -> Tensor:
        """P(Y > threshold)."""
        inf = torch.full_like(self.loc, OPEN)
        return self._log_interval((threshold - self.loc) / self.scale, inf).exp()

    def _log_interval(self, low: Tensor, high: Tensor) -> Tensor:
        raise NotImplementedError

    def _standard(self, shape: torch.Size) -> Tensor:
        raise NotImplementedError


OPEN = 1e30  # stands for an infinite end: σ and Φ are 0 or 1 there to the last bit, and gradients stay finite


class DiscretizedLogistic(_Discretized):
    r"""Logistic law rounded to grey levels, p(x) = σ((x + ½ - μ)/s) - σ((x - ½ - μ)/s), end levels open.

    Args:
        loc: μ, in grey levels, any shape.
        scale: s > 0, in grey levels, broadcastable with `loc`.
        levels: number L of grey levels; the support is 0..L-1 and the L masses sum to 1.

    Source: Salimans, Karpathy, Chen, Kingma, "PixelCNN++", 2017, arXiv:1701.05517.
    """

    def _log_interval(self, low: Tensor, high: Tensor) -> Tensor:
        return log_interval_logistic(low, high)

    def _standard(self, shape: torch.Size) -> Tensor:
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.logit(uniform.clamp(torch.finfo(uniform.dtype).tiny, 1 - torch.finfo(uniform.dtype).eps))


class DiscretizedNormal(_Discretized):
    r"""Normal law rounded to grey levels, p(x) = Φ((x + ½ - μ)/σ) - Φ((x - ½ - μ)/σ), end levels open.

    Args:
        loc: μ, in grey levels, any shape.
        scale: σ > 0, in grey levels, broadcastable with `loc`.
        levels: number L of grey levels; the support is 0..L-1 and the L masses sum to 1.
    """

    def _log_interval(self, low: Tensor, high: Tensor) -> Tensor:
        return log_interval_normal(low, high)

    def _standard(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)


def discretized_normal_moments(loc: Tensor, scale: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    r"""First two moments, about μ, of a normal variable that is known to round to a level.

    With a, b the ends of the level's interval in standard units and Z its mass, E[y - μ] = σ (φ(a) - φ(b)) / Z and
    E[(y - μ)²] = σ² (1 + (a φ(a) - b φ(b)) / Z).

    Args:
        loc: μ, in grey levels, any shape.
        scale: σ > 0, in grey levels, the same shape.
        levels: number L of grey levels.

    Returns:
        Both moments, shape (*loc.shape, L), in grey levels and in their square.
    """
    loc, scale = loc.unsqueeze(-1), scale.unsqueeze(-1)
    edges = (torch.arange(1, levels, dtype=loc.dtype, device=loc.device) - 0.5 - loc) / scale  # (..., L - 1)
    far = torch.full_like(loc, OPEN)
    low, high = torch.cat([-far, edges], -1), torch.cat([edges, far], -1)  # (..., L)
    log_mass = log_interval_normal(low, high)
    at_low, at_high = _over_mass(low, log_mass), _over_mass(high, log_mass)
    return scale * (at_low - at_high), scale**2 * (1 + low * at_low - high * at_high).clamp(min=0)


def _over_mass(edge: Tensor, log_mass: Tensor) -> Tensor:
    """φ(edge) / mass, which is 0 at an open end."""
    inside = edge.abs() < OPEN
    exponent = -0.5 * edge.masked_fill(~inside, 0).square() - LOG_ROOT_TAU - log_mass
    return exponent.exp().masked_fill(~inside, 0)


LOG_ROOT_TAU = 0.5 * math.log(2 * math.pi)


class Levels(Categorical):
    """Any law on the grey levels 0..L-1, by logits (..., L); values are floating point, as all observations are."""

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """E X = Σ_l l P(X = l)."""
        levels = torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
        return self.probs @ levels


class Mixture(TorchDistribution):
    r"""Mixture of laws of whole images, p(x) = Σ_k π_k p_k(x), by matrix products over flat rows of pixels.

    Args:
        logits: log π up to a constant, shape (K,).
        components: the p_k, one of the classes `...Components` below: `log_prob` of rows (n, D) is (n, K), nats,
            `draw(k, num)` gives rows (num, D) of p_k, and `support` is that of one pixel.
        shape: event shape of one observation, D = prod(shape).
        batch_shape: leading shape of independent copies.
    """

    arg_constraints = {}  # noqa: RUF012 (as every law of torch has it)

    def __init__(
        self,
        logits: Tensor,
        components: "Components",
        shape: Shape,
        batch_shape: Shape = (),
    ) -> None:
        self.log_weights, self.components = logits.log_softmax(-1), components
        super().__init__(torch.Size(batch_shape), torch.Size(shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Rows of what the components have in one pixel."""
        return constraints.independent(self.components.support, len(self.event_shape))

    def expand(self, batch_shape: Shape, _instance: object = None) -> "Mixture":
        return Mixture(self.log_weights, self.components, self.event_shape, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        lead = value.shape[: value.ndim - len(self.event_shape)]
        rows = value.reshape(-1, self.event_shape.numel())
        log_prob = torch.logsumexp(self.log_weights + self.components.log_prob(rows), -1).reshape(lead)
        return log_prob.expand(torch.broadcast_shapes(lead, self.batch_shape))

    def responsibilities(self, value: Tensor) -> Tensor:
        """p(k | x) = π_k p_k(x) / p(x) of values (n, *shape), shape (n, K)."""
        return (self.log_weights + self.components.log_prob(value.flatten(1))).softmax(-1)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            index = self.log_weights.exp().multinomial(shape.numel() // self.event_shape.numel(), replacement=True)
            rows = self.log_weights.new_empty(len(index), self.event_shape.numel())
            for k in index.unique().tolist():
                chosen = index == k
                rows[chosen] = self.components.draw(k, int(chosen.sum()))
            return rows.reshape(shape)


class Components(Protocol):
    """What a `Mixture` mixes."""

    @property
    def support(self) -> constraints.Constraint:
        """Of one pixel."""

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log p_k of rows (n, D), shape (n, K), nats."""

    def draw(self, k: int, num: int) -> Tensor:
        """Rows (num, D) of p_k."""


class BernoulliComponents:
    """Independent Bernoulli pixels, by logits (K, D)."""

    support = constraints.boolean

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log masses x·logit(θ) - Σ softplus(logit(θ)), shape (n, K)."""
        return rows.to(self.logits.dtype) @ self.logits.T - softplus(self.logits).sum(-1)

    def draw(self, k: int, num: int) -> Tensor:
        """Rows (num, D) of component k."""
        return self.logits[k].sigmoid().expand(num, -1).bernoulli()


class LevelComponents:
    """Independent pixels on grey levels, by a table of log masses (K, D, L)."""

    def __init__(self, log_mass: Tensor) -> None:
        self.log_mass = log_mass
        self.support = constraints.integer_interval(0, log_mass.shape[-1] - 1)

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log masses, one look-up per pixel and component; shape (n, K)."""
        num_components, _, levels = self.log_mass.shape
        table = self.log_mass.permute(1, 2, 0).reshape(-1, num_components)  # (D L, K)
        return embedding_bag(cells(rows, levels), table, mode="sum")

    def draw(self, k: int, num: int) -> Tensor:
        """Rows (num, D) of component k."""
        return Levels(logits=self.log_mass[k], validate_args=False).sample((num,))


def cells(rows: Tensor, levels: int) -> Tensor:
    """Place of each pixel's grey level in a table of all pixels and levels: d L + x_d, long, shape (n, D)."""
    return rows.long() + levels * torch.arange(rows.shape[-1], device=rows.device)


def log_shares(obs: Tensor, levels: int, pseudo_count: float = 1.0) -> Tensor:
    """Log share of each grey level in each pixel of obs (n, ...), `pseudo_count` spread over them; (D, L), float64."""
    rows = obs.flatten(1)
    counts = cells(rows, levels).flatten().bincount(minlength=rows.shape[1] * levels).double().view(-1, levels)
    return ((counts + pseudo_count / levels) / (len(obs) + pseudo_count)).log()


class NormalComponents:
    """Independent normal pixels, by mean and standard deviation, both (K, D).

    (x - μ)²/σ² is three matrix products that nearly cancel where σ is small, so they are taken in float64.
    """

    support = constraints.real

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log densities, shape (n, K)."""
        center = self.loc.detach().double().mean(0)
        x, loc, scale = rows.double() - center, self.loc.double() - center, self.scale.double()
        precision = scale**-2
        square = x**2 @ precision.T - 2 * x @ (precision * loc).T + (precision * loc**2).sum(-1)
        log_prob = -0.5 * square - (scale.log() + LOG_ROOT_TAU).sum(-1)
        return log_prob.to(self.loc.dtype)

    def draw(self, k: int, num: int) -> Tensor:
        """Rows (num, D) of component k."""
        return torch.normal(self.loc[k].expand(num, -1), self.scale[k].expand(num, -1))


class CorrelatedComponents:
    """Correlated normal pixels: full covariance by a Cholesky factor, or low rank by loadings; in float64.

    Args:
        loc: means (K, D).
        factor: lower triangular L (K, D, D) with Σ_k = L_k L_k', or loadings W (K, D, q).
        scale: None, or isotropic noise σ (K, 1), and then Σ_k = W_k W_k' + σ_k² I.
    """

    support = constraints.real

    def __init__(self, loc: Tensor, factor: Tensor, scale: Tensor | None = None) -> None:
        self.dtype = loc.dtype
        self.laws: list[MultivariateNormal | LowRankMultivariateNormal] = []
        for k, (mean, matrix) in enumerate(zip(loc.double(), factor.double(), strict=True)):
            if scale is None:
                self.laws.append(MultivariateNormal(mean, scale_tril=matrix, validate_args=False))
            else:
                noise = scale[k].double().square().expand_as(mean)
                self.laws.append(LowRankMultivariateNormal(mean, matrix, noise, validate_args=False))

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log densities, shape (n, K)."""
        rows = rows.double()
        return torch.stack([law.log_prob(rows) for law in self.laws], -1).to(self.dtype)

    def draw(self, k: int, num: int) -> Tensor:
        """Rows (num, D) of component k."""
        return self.laws[k].sample((num,)).to(self.dtype)
