"""The chain rule p(x) = Π_d p(x_d | x_1, ..., x_{d-1}) as one law of whole images, and what models by it share."""

from collections.abc import Callable

import pyro
import torch
from pyro.distributions import Bernoulli, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.distributions import Levels, Shape, log_shares
from pyro_vae.spaces import Binary, Quantized, Space
from pyro_vae.traces import announce

Step = Callable[[Tensor, int], Tensor]

BLOCK_ROWS = 256  # images in one pass where no gradient is recorded: 256 bytes of 784 pixels are 200 MB of logits


class ChainRule(TorchDistribution):
    r"""p(x) = Π_d p(x_d | pixels before d), every factor a law of one pixel that a network gives.

    `log_prob` takes one pass of the network, since all pixels are known; `sample` takes one for each pixel.

    Args:
        params: from x (n, *shape) to parameters (n, *shape, P) of the law of every pixel. Those of a pixel must depend
            on the pixels before it only: nothing here can make it so.
        pixel: from parameters (..., P) to the law of the pixels, batch shape (...), no event dimension.
        support: of one pixel.
        template: any tensor (*shape) with the dtype and the device of an observation.
        order: the pixels (indexes into the flat image) from the first to the last, shape (D,); the flat order if None.
        steps: gives, anew for each call of `sample`, a faster way to the parameters (n, P) of one pixel: a function of
            the rows (n, D) drawn so far, 0 from there on, and of the pixel's index, called in the order of the pixels.
            It may carry a state from pixel to pixel. If None, `params` is run for each pixel.
        progress: show a bar while sampling.
        batch_shape: leading shape of independent copies.

    Source: Larochelle, Murray, "The Neural Autoregressive Distribution Estimator", 2011 (AISTATS).
    """

    arg_constraints = {}  # noqa: RUF012 (as every law of torch has it)

    def __init__(
        self,
        params: Callable[[Tensor], Tensor],
        pixel: Callable[[Tensor], TorchDistribution],
        support: constraints.Constraint,
        template: Tensor,
        *,
        order: Tensor | None = None,
        steps: Callable[[], Step] | None = None,
        progress: bool = False,
        batch_shape: Shape = (),
    ) -> None:
        if order is not None and order.shape != (template.numel(),):
            raise ValueError(
                f"order must have shape ({template.numel()},), one entry per pixel, got {tuple(order.shape)}"
            )
        self.params, self.pixel, self.pixel_support, self.template = params, pixel, support, template
        self.order, self.steps, self.progress = order, steps, progress
        super().__init__(torch.Size(batch_shape), template.shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """That of one pixel, for all of them."""
        return constraints.independent(self.pixel_support, len(self.event_shape))

    def expand(self, batch_shape: Shape, _instance: object = None) -> "ChainRule":
        return ChainRule(
            self.params,
            self.pixel,
            self.pixel_support,
            self.template,
            order=self.order,
            steps=self.steps,
            progress=self.progress,
            batch_shape=batch_shape,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(x) of (..., *shape), shape (...) with that of the batch, nats."""
        log_prob = self.log_conditionals(value).flatten(value.ndim - len(self.event_shape)).sum(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def log_conditionals(self, value: Tensor) -> Tensor:
        """Log p(x_d | pixels before d) of every pixel of (..., *shape), same shape, nats."""
        if value.shape[max(0, value.ndim - len(self.event_shape)) :] != self.event_shape:
            raise ValueError(f"value must have shape (..., {_listed(self.event_shape)}), got {tuple(value.shape)}")
        rows = value.reshape(-1, *self.event_shape)
        parts = (rows,) if torch.is_grad_enabled() else rows.split(BLOCK_ROWS)
        return torch.cat([self.pixel(self.params(part)).log_prob(part) for part in parts]).reshape(value.shape)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Exact draws, pixel after pixel, shape (*sample_shape, *batch_shape, *shape)."""
        from tqdm import tqdm

        shape = self._extended_shape(torch.Size(sample_shape))
        rows = self.template.new_zeros(shape).reshape(-1, self.template.numel())
        step = self.stepper()
        for index in tqdm(self.places(), desc="sampling", unit="pixel", disable=not self.progress, mininterval=1.0):
            rows[:, index] = self.pixel(step(rows, index)).sample()
        return rows.reshape(shape)

    def stepper(self) -> Step:
        """The way to the parameters of one pixel after another, anew for each walk through the pixels: see `steps`."""
        return self._recompute if self.steps is None else self.steps()

    def _recompute(self, rows: Tensor, index: int) -> Tensor:
        """Parameters (n, P) of a pixel, from all pixels of all images."""
        parts = rows.reshape(-1, *self.event_shape).split(BLOCK_ROWS)
        return torch.cat([self.params(part).flatten(1, -2)[:, index] for part in parts])

    def places(self) -> list[int]:
        """The pixels as indexes into the flat image, in their order."""
        natural = list(range(self.template.numel()))
        pixels = natural if self.order is None else self.order.tolist()
        if sorted(pixels) != natural:
            raise ValueError(f"order must hold each of 0..{len(natural) - 1} once, got {pixels}")
        return pixels


def _listed(shape: torch.Size) -> str:
    return ", ".join(map(str, shape))


def pixel_by_logits(logits: Tensor) -> TorchDistribution:
    """Law of pixels by logits (..., 1) of a bit, or (..., L) of the grey levels 0..L-1; batch shape (...)."""
    if logits.shape[-1] == 1:
        return Bernoulli(logits=logits.squeeze(-1), validate_args=False)
    return Levels(logits=logits, validate_args=False)


def num_logits(space: Space) -> int:
    """What `pixel_by_logits` takes for a pixel: 1 for a bit, one for each grey level."""
    return space.levels if isinstance(space, Quantized) else 1


def marginal_logits(space: Space, obs: Tensor) -> Tensor:
    """Logits of each pixel's values in obs (n, *shape) on its own, one count spread over them; (*shape, P)."""
    if isinstance(space, Quantized):
        return log_shares(obs, space.levels).reshape(*space.shape, space.levels)
    return space.marginal_params(obs).movedim(0, -1)


class PixelByPixel(nn.Module):
    r"""p(x) = Π_d p(x_d | pixels before d) by the logits of a network: what MADE, PixelCNN and PixelRNN share.

    A bit has a logit (Binary), a grey level a softmax over the levels (Quantized). There are no latent sites, so that
    log p is exact.

    Args:
        space: where the observations live.

    Attributes:
        bias: of the logits of every pixel, (*shape, P) with P = 1 or levels; where a fit starts.
    """

    spaces = (Binary, Quantized)

    def __init__(self, space: Space) -> None:
        super().__init__()
        if not isinstance(space, self.spaces):
            raise ValueError(f"{type(self).__name__} lives on Binary or Quantized, got {space}")
        self.space = space
        self.bias = nn.Parameter(torch.zeros(*space.shape, num_logits(space)))

    def logits(self, obs: Tensor) -> Tensor:
        """Those of every pixel (..., *shape, P), given the pixels before it; obs (..., *shape)."""
        raise NotImplementedError

    def steps(self) -> Step:
        """A faster way to the logits (n, P) of one pixel after another, see `ChainRule`."""
        raise NotImplementedError

    def order(self) -> Tensor | None:
        """The pixels from the first to the last, (D,); None row by row from the top left."""
        return None

    def distribution(self, *, progress: bool = False) -> ChainRule:
        """p(x); `progress` shows a bar while it is sampled."""
        num = num_logits(self.space)
        support = constraints.boolean if num == 1 else constraints.integer_interval(0, num - 1)
        return ChainRule(
            self.logits,
            pixel_by_logits,
            support,
            self.bias[..., 0],
            order=self.order(),
            steps=self.steps,
            progress=progress,
        )

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", self.distribution(), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """No latent sites."""

    @torch.no_grad()
    def initialize(self, obs: Tensor) -> None:
        """Start at the shares of each pixel's values in the training data."""
        self.bias.copy_(marginal_logits(self.space, obs))
