"""Measure what the library promises against known answers and write the table; `make verify` runs it whole.

python tests/verify.py --small                                          # minutes, needs no files
python tests/verify.py --root data --run runs/mnist/vae --out docs/verification.md
python tests/verify.py --only 7 --out docs/verification.md   # item 7 anew; the others stay as they were measured
"""

import argparse
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from verification import Row, annealing, coverage, mnist_vae, pairs, posteriors, reproducibility, two_modes  # noqa: E402

from pyro_vae.study import num_cores  # noqa: E402

SEED = 0
HEAD = f"""# Verification

What `make verify` prints: every promise measured against a known answer, with seed {SEED}. An item that was measured
anew on its own (`tests/verify.py --only`) says when and how; the others stand as they were.

Coverage is that of nominal 95% intervals; the bands are the central 99.9% of the binomial law for the number of
repeats. "per datum" is the interval of one image's log p, "mean of n" that of the mean over n fixed data. A case whose
weights are too heavy must be flagged; one that is flagged or warned of makes no claim.
"""
COLUMNS = """| | case | seen | asked |
|---|---|---|---|
"""


def tasks(small: bool, root: str | None, run: Path) -> dict[str, partial[Iterator[Row]]]:
    """What is measured, by name, in the order of the table; each on its own."""
    found = {
        f"coverage {name}": partial(coverage.rows, small, name)
        for name in (coverage.SMALL if small else coverage.CASES)
    }
    found["two modes"] = partial(two_modes.rows, small)
    found |= {
        "ppca": partial(annealing.ppca, small),
        "intervals of annealing": partial(annealing.intervals, small),
        "brackets": partial(annealing.brackets, small),
        "rbm": partial(annealing.rbm, small, root),
    }
    if not small:
        found["mnist"] = partial(mnist_vae.rows, run, root)
    targets = ("correlated",) if small else posteriors.TARGETS
    found |= {f"posteriors {name}": partial(posteriors.rows, small, name) for name in targets}
    found |= {f"pairs {name}": partial(pairs.rows, small, name) for name in pairs.PARTS}
    found["reproducibility"] = partial(reproducibility.rows, small)
    return found


def item_of(task: partial[Iterator[Row]]) -> str:
    """The item of the table that a task belongs to: that of its file."""
    return sys.modules[task.func.__module__].ITEM


BEGUN_FIRST = (
    "mnist",
    "posteriors correlated",
    "posteriors two moons",
    "two modes",
    "pairs two",
    "coverage vae",
    "brackets",
    "intervals of annealing",
    "pairs six",
)


def measure(name: str, small: bool, root: str | None, run: Path) -> tuple[list[Row], float]:
    """The rows of one task and its minutes, on one thread, in whatever process this is."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    return list(tasks(small, root, run)[name]()), (time.perf_counter() - started) / 60


def line(row: Row) -> str:
    outcome = {True: "holds", False: "**fails**", None: "reported"}[row.holds]
    return f"| {outcome} | {row.case} | {row.seen} | {row.asked} |"


def written(path: Path, sections: dict[str, str], items: Iterable[str]) -> None:
    """Write a section for each item; those of a file that is there already stay if they were not measured now.

    Args:
        path: of the table.
        sections: what was measured, by item.
        items: all that there are; the section of another is dropped.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    there = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    before = {item: there[item] for item in items if item in there}
    body = [f"\n## {item}\n{contents.strip()}\n" for item, contents in sorted({**before, **sections}.items())]
    path.write_text(HEAD + "".join(body), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer repeats, digits for MNIST")
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies")
    parser.add_argument("--run", type=Path, default=Path("runs/mnist/vae"), help="the VAE; fitted if it is not there")
    parser.add_argument("--jobs", type=int, default=num_cores(), help="processes, of one thread each")
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="these items of the table")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file to write")
    arguments = parser.parse_args()
    if arguments.small and arguments.out is not None:
        parser.error("--small measures too little for a table: leave --out out")
    where = (arguments.small, arguments.root, arguments.run)
    items, started = {name: item_of(task) for name, task in tasks(*where).items()}, time.perf_counter()
    unknown = set(arguments.only or []) - {number(item) for item in items.values()}
    if unknown:
        parser.error(f"no item {', '.join(map(str, unknown))}; there are {', '.join(dict.fromkeys(items.values()))}")
    names = [name for name, item in items.items() if not arguments.only or number(item) in arguments.only]
    found: dict[str, tuple[list[Row], float]] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        order = sorted(names, key=lambda name: (*BEGUN_FIRST, name).index(name))
        futures = {pool.submit(measure, name, *where): name for name in order}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            for row in future.result()[0]:
                print(f"{row.item} {line(row)}", flush=True)
    rows = [row for name in names for row in found[name][0]]
    promised = [row for row in rows if row.holds is not None]
    failed = sum(not row.holds for row in promised)
    if arguments.out is not None:
        parts = {item: [found[name] for name in names if items[name] == item] for item in items.values()}
        written(arguments.out, {item: section(part) for item, part in parts.items() if part}, items.values())
    minutes = (time.perf_counter() - started) / 60
    print(f"{len(promised) - failed} of {len(promised)} hold; {minutes:.1f} minutes")
    return 1 if failed else 0


def number(item: str) -> int:
    """The number that an item begins with."""
    return int(item.split()[0])


def section(found: list[tuple[list[Row], float]]) -> str:
    """When and how the tasks of an item were measured, and their rows."""
    minutes, today = sum(minutes for _, minutes in found), time.strftime("%Y-%m-%d", time.gmtime())
    machine = f"one thread, Python {platform.python_version()}, torch {torch.__version__}"
    lines = "\n".join(line(row) for rows, _ in found for row in rows)
    return f"{today}; {machine}; {minutes:.0f} minutes in all.\n\n{COLUMNS}{lines}"


if __name__ == "__main__":
    sys.exit(main())
