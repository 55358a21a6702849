"""Starts of mixtures: k-means++ centres and a few of Lloyd's passes on a random subset of the data."""

import torch
from torch import Tensor

ROWS_PER_COMPONENT = 20  # random rows per component that k-means looks at
K_MEANS_PASSES = 5


def k_means_plus_plus(obs: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Centres that are spread out: each next one is drawn in proportion to its squared distance from those before.

    Args:
        obs: data (n, D).
        num: number of centres.
        generator: source of randomness, on the CPU.

    Returns:
        `num` distinct rows of `obs`, shape (num, D).

    Raises:
        ValueError: fewer than `num` rows are distinct.

    Source: Arthur, Vassilvitskii, "k-means++: the advantages of careful seeding", 2007 (SODA).
    """
    chosen = [int(torch.randint(len(obs), (), generator=generator))]
    distance = _squared_distance(obs, chosen[0])
    while len(chosen) < num:
        cumulative = distance.cumsum(0)
        if cumulative[-1] == 0:
            raise ValueError(f"{num} components need {num} distinct observations, got {len(chosen)}")
        point = cumulative[-1] * float(torch.rand((), generator=generator))
        chosen.append(int(torch.searchsorted(cumulative, point, right=True)))
        distance = torch.minimum(distance, _squared_distance(obs, chosen[-1]))
    return obs[chosen]


def _squared_distance(obs: Tensor, index: int) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"  # so that equal rows are at distance 0
    return torch.cdist(obs, obs[index : index + 1], compute_mode=exact).squeeze(1).double() ** 2


def k_means(obs: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Centres (num, D), float64, after a few of Lloyd's passes from k-means++, on a random subset of rows (n, D)."""
    rows = _flat(obs, random_rows(len(obs), num, generator))
    try:
        centers = k_means_plus_plus(rows, num, generator)
    except ValueError:  # too few distinct rows among these
        rows = _flat(obs, slice(None))
        centers = k_means_plus_plus(rows, num, generator)
    for _ in range(K_MEANS_PASSES):
        member = one_hot(rows, centers)  # (n, K)
        counts = member.sum(0).unsqueeze(-1)
        centers = torch.where(counts > 0, member.T @ rows / counts.clamp(min=1), centers)
    return centers


def random_rows(num_rows: int, num: int, generator: torch.Generator) -> Tensor:
    """Indices of the rows that are looked at for `num` centres, in random order."""
    return torch.randperm(num_rows, generator=generator)[: ROWS_PER_COMPONENT * max(num, 100)]


def _flat(obs: Tensor, index: Tensor | slice) -> Tensor:
    chosen = obs[index.to(obs.device) if isinstance(index, Tensor) else index]
    return chosen.flatten(1).double()


def one_hot(rows: Tensor, centers: Tensor) -> Tensor:
    """The nearest centre of each row (n, D) as one-hot rows (n, K)."""
    nearest = (0.5 * centers.square().sum(-1) - rows.to(centers) @ centers.T).argmin(-1)
    return torch.nn.functional.one_hot(nearest, len(centers)).to(centers.dtype)
