"""The gradients of a global batch that several processes share: DistributedDataParallel over the loss as a module."""

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pyro_vae import distributed
from pyro_vae.objectives import Objective
from pyro_vae.traces import Pair


class SharedGradients:
    """Loss of a global batch, its gradients left in the parameters' `grad`, both the same in every process.

    The loss is a mean over data and every process takes the mean over its own, so that the mean over the processes is
    that of the global batch once each is weighted by its share of the data.

    Args:
        objective: what is maximised.
        pair: model and guide.
        modules: that hold the parameters of the pair; those of the first process are taken by all.
        compile: True warns that there is no graph.

    Raises:
        ValueError: for batch normalisation, whose statistics would be those of one process's data.
    """

    way = "eager"
    reason = "the gradients of several processes are averaged as autograd leaves them"

    def __init__(self, objective: Objective, pair: Pair, modules: nn.Module, compile: bool | None = None) -> None:
        if compile:
            warnings.warn(f"compile=True has no effect, the pair runs as Pyro does: {self.reason}", stacklevel=2)
        normalised = [name for name, module in modules.named_modules() if isinstance(module, _BatchNorm)]
        if normalised:
            raise ValueError(
                f"several processes cannot share a batch whose data are normalised by its own mean ({normalised[0]}): "
                "fit in one process, or use another normalisation"
            )
        loss = _Loss(objective, pair, [p for p in modules.parameters() if p.requires_grad])
        self.parallel = DistributedDataParallel(loss, find_unused_parameters=True)  # they have no gradient alone either

    def __call__(self, args: tuple[Tensor, ...], weight: float) -> Tensor:
        """The loss of the global batch, nats per datum, from this process's rows inside `distributed.part_of`.

        Args:
            args: this process's rows.
            weight: of the latent terms.
        """
        self.parallel.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            loss = self.parallel(args, weight) * distributed.share()
            loss.backward()
        return distributed.mean(loss.detach())


class _Loss(nn.Module):
    """The loss as the forward pass of a module; of buffers, which no step changes, it shows none to be sent around."""

    def __init__(self, objective: Objective, pair: Pair, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.objective, self.pair, self.shown = objective, pair, nn.ParameterList(parameters)

    def forward(self, args: tuple[Tensor, ...], weight: float) -> Tensor:
        return self.objective.loss(self.pair, args, weight)
