"""Random numbers: seeds that do not meet, and stretches of code with random numbers of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

START, SHUFFLE, NOISE, VALIDATION = range(4)  # streams of the seed of a fit


def derived_seed(seed: int, *index: int) -> int:
    """A seed for one part of a computation, independent of those of all other indices (numpy's SeedSequence)."""
    state = np.random.SeedSequence(seed, spawn_key=index).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def reseed(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and, for a GPU, that device's; all other devices keep theirs.

    `torch.manual_seed` would touch every GPU, and is slow where CUDA is built in but absent.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def own_randomness(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Random numbers from `seed` inside; the global state is as before afterwards."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        reseed(seed, device)
        yield


def systematic(shares: Tensor, size: int, num_columns: int) -> Tensor:
    """Indices drawn with probabilities `shares`, in each column as evenly as they can be, and in random order.

    Systematic sampling followed by a permutation: each index on its own has exactly the law `shares`, so that any part
    of a column is unbiased, while index i comes up floor(size shares_i) or so many plus one times in each.

    Args:
        shares: probabilities, shape (num_shares,).
        size: length of a column.
        num_columns: independent columns.

    Returns:
        Shape (size, num_columns), int64.
    """
    shape = (size, num_columns)
    steps = torch.arange(size, device=shares.device)[:, None]
    points = (steps + torch.rand(1, num_columns, device=shares.device, dtype=torch.float64)) / size
    index = torch.searchsorted((shares.double().cumsum(0) / shares.double().sum())[:-1], points, right=True)
    return index.gather(0, torch.rand(shape, device=shares.device).argsort(0))
