"""Measure what the library promises against known answers and write the table; `make verify` runs it whole.

python tests/verify.py --small                                          # minutes, needs no files
python tests/verify.py --root data --run runs/mnist/vae --out docs/verification.md
"""

import argparse
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from verification import Row, annealing, coverage, mnist_vae, pairs, posteriors, reproducibility, two_modes  # noqa: E402

from pyro_vae.study import num_cores  # noqa: E402

SEED = 0
HEAD = """# Verification

What `make verify` prints: every promise measured against a known answer.
Seed {seed}; {machine}; {minutes:.0f} minutes.

Coverage is that of nominal 95% intervals; the bands are the central 99.9% of the binomial law for the number of
repeats. "per datum" is the interval of one image's log p, "mean of n" that of the mean over n fixed data. A case whose
weights are too heavy must be flagged; one that is flagged or warned of makes no claim.

| | item | case | seen | asked |
|---|---|---|---|---|
"""


def tasks(small: bool, root: str | None, run: Path) -> dict[str, Callable[[], Iterator[Row]]]:
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
        found |= {f"posteriors {name}": partial(posteriors.rows, name) for name in posteriors.TARGETS}
    found |= {f"pairs {name}": partial(pairs.rows, small, name) for name in pairs.PARTS}
    found["reproducibility"] = partial(reproducibility.rows, small)
    return found


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


def measure(name: str, small: bool, root: str | None, run: Path) -> list[Row]:
    """The rows of one task, on one thread, in whatever process this is."""
    torch.set_num_threads(1)
    return list(tasks(small, root, run)[name]())


def line(row: Row) -> str:
    outcome = {True: "holds", False: "**fails**", None: "reported"}[row.holds]
    return f"| {outcome} | {row.item} | {row.case} | {row.seen} | {row.asked} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer repeats, digits for MNIST")
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies")
    parser.add_argument("--run", type=Path, default=Path("runs/mnist/vae"), help="the VAE; fitted if it is not there")
    parser.add_argument("--jobs", type=int, default=num_cores(), help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file to write")
    arguments = parser.parse_args()
    where = (arguments.small, arguments.root, arguments.run)
    names, started = list(tasks(*where)), time.perf_counter()
    found: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        order = sorted(names, key=lambda name: (*BEGUN_FIRST, name).index(name))
        futures = {pool.submit(measure, name, *where): name for name in order}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            for row in future.result():
                print(line(row), flush=True)
    rows = [row for name in names for row in found[name]]
    lines, promised = [line(row) for row in rows], [row for row in rows if row.holds is not None]
    failed = sum(not row.holds for row in promised)
    minutes = (time.perf_counter() - started) / 60
    machine = f"{arguments.jobs} processes of one thread, Python {platform.python_version()}, torch {torch.__version__}"
    if arguments.out is not None:
        head = HEAD.format(seed=SEED, machine=machine, minutes=minutes)
        arguments.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(promised) - failed} of {len(promised)} hold; {minutes:.1f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
