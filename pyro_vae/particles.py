"""Log weights of K particles of each datum, with the gradients that training needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from pyro_vae import traces
from pyro_vae.traces import Pair, Values, Weight


@dataclass(frozen=True)
class Particles:
    """How the weights of a batch are computed: K draws for each datum, under an outer plate or on tiled data."""

    num: int
    tiled: bool

    def log_weights(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight = 1.0) -> Tensor:
        """Log w_k, shape (num_particles, n), nats."""
        values, log_q = traces.draw_latents(pair, args, self.num, self.tiled)
        return self._log_weights(pair, args, values, log_q, weight)

    def path_log_weights(self, pair: Pair, args: tuple[Tensor, ...], weight: Weight) -> tuple[Tensor, Values]:
        """The same numbers, whose gradient reaches the parameters of q through the draws z_k alone, and these draws.

        log q(z | x) is asked for at copies of the draws while no parameter takes a gradient. The copies are what a
        weight depends on: where a second site is drawn given a first, the gradient at a copy is the partial derivative
        of log w, and only then goes down through how both were drawn. At the draws themselves it would be mixed with
        what comes through later ones, and could not be scaled. A copy is also no draw that a flow remembers, with the
        way back to the parameters in its memory.
        """
        draws, _ = traces.draw_latents(pair, args, self.num, self.tiled)
        copies = {name: value.clone() for name, value in draws.items()}
        with _constant(pair):
            log_q = traces.log_density(pair.guide, args, copies, self.num, self.tiled)
        return self._log_weights(pair, args, copies, log_q, weight), copies

    def _log_weights(
        self, pair: Pair, args: tuple[Tensor, ...], values: Values, log_q: Tensor, weight: Weight
    ) -> Tensor:
        log_prior, log_likelihood = traces.log_prior_and_likelihood(pair, args, values, self.num, self.tiled)
        return log_likelihood + weight * (log_prior - log_q)


@contextmanager
def _constant(pair: Pair) -> Iterator[None]:
    """What is computed inside depends on no parameter; what was recorded before keeps its gradients."""
    parameters = [p for module in pair.modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
