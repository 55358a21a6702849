"""Ratios of times: what is compared runs turn by turn, and the ratio is the median over the rounds."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from report import Report, synchronise

ROUNDS = 7


def turn_by_turn(
    device: torch.device, tasks: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of each task in each round, after one call of each that does not count.

    On one thread of a CPU these are the seconds that the process ran, which other processes do not add to. A round runs
    every task once and begins with another task than the round before, so that a machine that is busy for a while slows
    all of them.
    """
    names = list(tasks)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            synchronise(device)
            started = clock()
            tasks[name]()
            synchronise(device)
            seconds[name].append(clock() - started)
    return seconds


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Of each round."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def add_ratio(
    report: Report,
    row: str,
    per_round: list[float],
    *,
    bar: str | None = None,
    moonshot: str | None = None,
    **more: Any,
) -> None:
    """A row of the table: the median ratio, the rounds that it comes from, and what it was to be.

    Args:
        report: that it goes into.
        row: what is compared with what.
        per_round: ratio of each round.
        bar: what it has to be, as in "<= 1.15" or ">= 4.5"; None where nothing is promised.
        moonshot: what would be better still, in the same form.
        more: further entries.
    """
    median = statistics.median(per_round)
    spread = [min(per_round), max(per_round)]
    holds = {name: meets(median, limit) for name, limit in (("holds", bar), ("is_moonshot", moonshot)) if limit}
    report.add(row=row, ratio=median, range=spread, rounds=len(per_round), bar=bar, moonshot=moonshot, **holds, **more)


def meets(value: float, limit: str) -> bool:
    """Whether a value is as `limit` says, "<= 1.15" or ">= 4.5" or "< 0.001"."""
    sign, number = limit.split()
    return {"<=": value <= float(number), ">=": value >= float(number), "<": value < float(number)}[sign]
