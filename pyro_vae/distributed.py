"""One job in several processes, as torchrun starts them: whose share is what, and how the shares come together."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LONGEST_WAIT = timedelta(hours=1)  # of one process for another that is alive; one that is gone is noticed at once
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torchrun

_place = (0, 1)  # rank and number of processes, inside `processes()`
_share = 1.0  # what the mean over this process's rows of a batch counts for, inside `part_of()`


def launched() -> int:
    """The number of processes that torchrun started this one with; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def rank() -> int:
    """The number of this process among those that share the work, from 0."""
    return _place[0]


def size() -> int:
    """How many processes share the work: 1 outside of `processes()`, whatever torchrun started."""
    return _place[1]


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextmanager
def processes(device: str | None = None) -> Iterator[str | None]:
    """Share the work inside with the other processes that torchrun started, who must all come here.

    `log_likelihood` gives every process the whole result, with the digits that one process gives: the data are scored
    in blocks whose noise has a seed of its own, whoever scores them. What an estimator of the user's computes by
    itself, every process computes. Without torchrun nothing changes.

    Args:
        device: "cpu", "cuda", or None for GPUs if there are any.

    Yields:
        The device of this process: under torchrun a GPU of its own, cuda:LOCAL_RANK.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine, or a GPU is named for all of them.
    """
    global _place
    if launched() == 1:
        yield device
        return
    import torch.distributed as dist

    device = _own_device(device)
    begins_here = not dist.is_initialized()
    if begins_here:
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=LONGEST_WAIT)
    before, _place = _place, (dist.get_rank(), dist.get_world_size())
    try:
        yield device
    finally:
        _place = before
    if begins_here:  # not after an error, when it would wait for the others; torchrun ends them
        dist.destroy_process_group()


def _own_device(device: str | None) -> str:
    """The CPU, or the GPU whose number is that of this process on its machine."""
    import torch

    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return "cpu"
    if device not in (None, "cuda"):
        raise ValueError(f"under torchrun every process has a GPU of its own: device must be cpu or cuda, got {device}")
    needed, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if needed > found:
        raise ValueError(f"{needed} processes on one machine need {needed} GPUs, found {found}; or use device cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def part_of(index: "Tensor") -> "Iterator[Tensor]":
    """This process's rows of a global batch; inside, `share()` says what the mean over them counts for."""
    global _share
    mine, before = index.tensor_split(size())[rank()], _share
    _share = size() * len(mine) / len(index)
    try:
        yield mine if len(mine) else index[:1]  # fewer rows than processes: one that counts for nothing
    finally:
        _share = before


def share() -> float:
    """What the mean over this process's rows counts for.

    The shares have the mean 1 over the processes: that of all `share` x mean is the mean over the global batch, however
    unequal the parts are.
    """
    return _share


def over_batch(mean_here: "Tensor") -> "Tensor":
    """A mean over this process's rows as that over the global batch, with the gradient of the former.

    For a loss that is no mean over data but a function of one: with the chain rule, its gradients average to that of
    the global batch.
    """
    if size() == 1:
        return mean_here
    here = mean_here.detach()
    return mean_here + (mean(here * _share) - here)


def takes(index: int) -> bool:
    """Whether the piece of work with this number, from 0, is this process's: they are dealt out in turn."""
    return index % size() == rank()


def joined(
    parts: Mapping[int, Mapping[str, "Tensor"]], num_rows: int, device: "torch.device | str"
) -> "dict[str, Tensor]":
    """The rows of all processes, bit for bit.

    Args:
        parts: by their first row, the blocks of this process, {name: (rows, ...)}; the first process has the first.
        num_rows: of all blocks of all processes.
        device: where to put them.

    Returns:
        {name: (num_rows, ...)}, the same in every process.
    """
    import torch

    if size() == 1:
        names = next(iter(parts.values()))
        return {name: torch.cat([part[name] for part in parts.values()]).to(device) for name in names}
    kinds = {name: (values.shape[1:], values.dtype) for name, values in parts[0].items()} if is_first() else None
    whole = {}
    for name, (shape, dtype) in _from_first(kinds).items():
        rows = torch.zeros(num_rows, *shape, dtype=dtype)
        for start, part in parts.items():
            rows[start : start + len(part[name])] = part[name]
        _add_up(rows.view({1: torch.uint8, 4: torch.int32, 8: torch.int64}[dtype.itemsize]))  # keeps NaN and -0, too
        whole[name] = rows.to(device)
    return whole


def mean(values: "Tensor") -> "Tensor":
    """The mean over the processes."""
    if size() == 1:
        return values
    values = values.clone()
    _add_up(values)
    return values / size()


def total(value: float) -> float:
    """The sum over the processes."""
    if size() == 1:
        return value
    import torch

    values = torch.tensor([value], dtype=torch.float64)
    _add_up(values)
    return float(values)


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if size() == 1:
        return value
    import torch
    import torch.distributed as dist

    values = torch.tensor([value])
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def wait() -> None:
    """Go on when all processes have come here."""
    largest(0)


def _from_first(value: Any) -> Any:
    """What the first process has."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _add_up(values: "Tensor") -> None:
    """The sum over the processes, in place."""
    import torch.distributed as dist

    dist.all_reduce(values)
