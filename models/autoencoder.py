"""Autoencoder, plain or denoising: a code from which the observation is rebuilt with the least squared error."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checks import check_count, check_number
from ..data import Data
from ..minibatches import Row, least_error
from ..networks import make_decoder, make_encoder
from ..spaces import Binary, Quantized, Real, Space


class Autoencoder(nn.Module):
    r"""x̂ = d(e(x̃)) with the least mean of ‖x - x̂‖², x in [0, 1] where the space is bounded (`space.to_unit`).

    The code is e(x), of `latent_dim` numbers; encoder and decoder are those of `VAE`. x̃ is x itself, or (denoising) x
    with noise, and then the best x̂ is E[x | x̃]. There is no p(x): a squared error is no -log p, and codes have no law.

    Args:
        space: where the observations live.
        latent_dim: numbers in a code.
        hidden_dims: widths of the encoder's layers; the decoder mirrors them.
        network: "mlp", "conv" or "resnet".
        activation: "tanh", "relu", "silu" or "elu".
        noise: of x̃ in training, 0 for none. Share of the bits that are flipped, below ½ (Binary), or standard deviation
            of a Gaussian, in units of x (Quantized, Real).

    Source: Hinton, Salakhutdinov, "Reducing the dimensionality of data with neural networks", 2006 (Science); Vincent,
    Larochelle, Bengio, Manzagol, "Extracting and composing robust features with denoising autoencoders", 2008 (ICML).
    """

    spaces = (Binary, Quantized, Real)
    no_log_prob = (
        "it minimises a squared error, which is not -log p(x), and its codes have no prior to draw from; take VAE or "
        "PPCA for log p(x) and samples, and features for the codes of this one"
    )

    def __init__(
        self,
        space: Space,
        *,
        latent_dim: int = 50,
        hidden_dims: Sequence[int] = (200, 200),
        network: str = "mlp",
        activation: str = "tanh",
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("latent_dim", latent_dim)
        check_number("noise", noise)
        if noise < 0 or (isinstance(space, Binary) and noise >= 0.5):
            limit = "a share of bits from 0 to below 0.5" if isinstance(space, Binary) else "0 or more"
            raise ValueError(f"noise must be {limit}, got {noise}")
        self.space, self.latent_dim, self.noise = space, latent_dim, noise
        self.is_bounded = not isinstance(space, Real) or space.levels is not None
        self.encoder = make_encoder(network, space.shape, hidden_dims, activation)
        self.code = nn.Linear(self.encoder.out_dim, latent_dim)
        self.decoder = make_decoder(network, latent_dim, hidden_dims, 1, space.shape, activation)

    def features(self, obs: Tensor, context: None = None) -> Tensor:
        """The codes e(x), shape (batch, latent_dim)."""
        return self.encode(self.space.to_unit(obs))

    def encode(self, unit: Tensor) -> Tensor:
        """Codes (..., latent_dim) of x (..., *shape) in unit scale."""
        return self.code(self.encoder(unit))

    def decode(self, code: Tensor) -> Tensor:
        """x̂ = d(code) in unit scale, (..., *shape), from codes (..., latent_dim)."""
        out = self.decoder(code).squeeze(-1 - len(self.space.shape))
        return out.sigmoid() if self.is_bounded else out

    def reconstruct(self, obs: Tensor) -> Tensor:
        """x̂ of observations without noise, in unit scale, shape (batch, *shape)."""
        return self.decode(self.features(obs))

    def corrupt(self, unit: Tensor) -> Tensor:
        """x̃: x with fresh noise."""
        if self.noise and isinstance(self.space, Binary):
            return (unit - torch.full_like(unit, self.noise).bernoulli()).abs()
        return unit + self.noise * torch.randn_like(unit) if self.noise else unit

    def error(self, obs: Tensor) -> Tensor:
        """‖x - d(e(x̃))‖² of each datum, shape (batch,), in squared units of x."""
        unit = self.space.to_unit(obs)
        return (unit - self.decode(self.encode(self.corrupt(unit)))).square().flatten(1).sum(-1)

    def initialize(self, obs: Tensor) -> None:
        """Start the decoder at the mean image."""
        mean = self.space.to_unit(obs).mean(0, keepdim=True)
        self.decoder.center(mean.clamp(MARGIN, 1 - MARGIN).logit() if self.is_bounded else mean)

    def own_training(
        self,
        data: Data,
        *,
        seed: int = 0,
        progress: Callable[[Row], None] = lambda row: None,
        num_epochs: int = 100,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
    ) -> list[Row]:
        """Fit by Adam with the one-cycle schedule that a VAE has; the parameters of the best epoch are kept.

        Args:
            data: where the batches come from; dynamic bits are drawn anew for each epoch.
            seed: of the order, of the noise and of the bits.
            progress: called with each row.
            num_epochs: passes over the training data.
            batch_size: data per step.
            learning_rate: the largest.

        Returns:
            One row for each epoch: train_error (a mean over its steps) and valid_error, both the mean of ‖x - d(e(x̃))‖²
            per datum (on validation data by one draw of the noise); best_epoch, whose valid_error is the least so far.

        Raises:
            FloatingPointError: an error that is not finite; it names the epoch.
        """
        return least_error(
            self,
            self.error,
            data,
            start=self.initialize,
            seed=seed,
            progress=progress,
            num_epochs=num_epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
        )


MARGIN = 1e-3  # of the mean image that the decoder starts at: logits of 0 and 1 are infinite
