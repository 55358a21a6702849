"""How a fit went: one row per epoch or iteration, which was best, and why it ended."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class History:
    """How a fit went.

    Attributes:
        rows: one dict per epoch (SVI: epoch, train_elbo, valid_elbo, kl_weight, learning_rate, seconds) or per
            iteration (maximum likelihood: epoch, train_log_prob); ELBO and log p in nats per datum.
        best_epoch: the epoch whose parameters the model now has.
        best_valid_elbo: its validation ELBO, nats per datum; None for maximum likelihood.
        status: "finished", "early stop" or "interrupted".
        seconds: wall-clock seconds, earlier parts of a resumed run included.
        ran_as: what most steps of SVI ran by: "eager", "graph", "inductor", "cuda graph"; see `compiled`.
        reason: why no graph was taken, if one was thought of.
    """

    rows: tuple[dict[str, float | None], ...]
    best_epoch: int
    best_valid_elbo: float | None
    status: str
    seconds: float
    ran_as: str = "eager"
    reason: str = ""


def write_rows(rows: Sequence[dict[str, float | None]], path: Path) -> None:
    """Write the rows of a history as CSV with a header; what is unknown stays empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["epoch"])
        writer.writeheader()
        writer.writerows(rows)
