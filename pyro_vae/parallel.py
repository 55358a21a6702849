"""The gradients of a global batch that several processes share: DistributedDataParallel over the loss as a module."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pyro_vae import distributed
from pyro_vae.objectives import Objective
from pyro_vae.randomness import own_randomness
from pyro_vae.traces import Pair


class SharedGradients:
    """Loss of a global batch, its gradients left in the parameters' `grad`, both the same in every process.

    The loss is a mean over data and every process takes the mean over its own, so that the mean over the processes is
    that of the global batch once each is weighted by its share of the data.

    Args:
        objective: what is maximised.
        pair: model and guide.
        modules: that hold the parameters of the pair; those of the first process are taken by all.
        args: a few data, the same in every process, on which the pair is tried out.
        compile: True warns that there is no graph.

    Raises:
        ValueError: for batch normalisation, whose statistics would be those of one process's data, and for any other
            buffer that the loss moves.
    """

    ran_as = "eager"
    reason = "the gradients of several processes are averaged as autograd leaves them"

    def __init__(
        self,
        objective: Objective,
        pair: Pair,
        modules: nn.Module,
        args: tuple[Tensor, ...],
        compile: bool | None = None,
    ) -> None:
        if compile:
            warnings.warn(f"compile=True has no effect, the pair runs as Pyro does: {self.reason}", stacklevel=2)
        normalised = [name for name, module in modules.named_modules() if isinstance(module, _BatchNorm)]
        if normalised:
            raise ValueError(
                f"several processes cannot share a batch whose data are normalised by its own mean ({normalised[0]}): "
                "fit in one process, or use another normalisation"
            )
        moved = _moved_buffers(objective, pair, modules, args)
        if moved:
            raise ValueError(
                "several processes cannot share a fit in which the pair changes buffers of its own, as each would have "
                f"those of its own data: {', '.join(moved)}; fit in one process, or leave them as they are in training"
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
        loss = self.parallel(args, weight) * distributed.share()
        loss.backward()
        return distributed.mean(loss.detach())


def _moved_buffers(objective: Objective, pair: Pair, modules: nn.Module, args: tuple[Tensor, ...]) -> list[str]:
    """Names of the buffers that are not, after one loss, the tensors that they were with the values that they had."""
    before = {name: (buffer, buffer.clone()) for name, buffer in modules.named_buffers()}
    with own_randomness(0, args[0].device):  # to look must not move the noise of the fit
        objective.loss(pair, args, 1.0)
    after = dict(modules.named_buffers())
    return [name for name in before | after if not _stayed(after.get(name), *before.get(name, (None, None)))]


def _stayed(buffer: Tensor | None, before: Tensor | None, values: Tensor | None) -> bool:
    if buffer is None or buffer is not before or values is None or buffer.shape != values.shape:
        return False
    return torch.allclose(buffer, values, rtol=0, atol=0, equal_nan=True)


class _Loss(nn.Module):
    """The loss as the forward pass of a module; of buffers, which no step changes, it shows none to be sent around.

    One parameter more, that nothing leads to, keeps DDP quiet: where all are used it says on stderr that it need not
    have looked for others. It has to, as a pair may use one in this step and not in the next, or in one process alone.
    """

    def __init__(self, objective: Objective, pair: Pair, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        unused = nn.Parameter(torch.zeros_like(parameters[0].flatten()[:1]))
        self.objective, self.pair, self.shown = objective, pair, nn.ParameterList([*parameters, unused])

    def forward(self, args: tuple[Tensor, ...], weight: float) -> Tensor:
        return self.objective.loss(self.pair, args, weight)
