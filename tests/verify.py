"""Measure what the library promises against known answers and write the table; `make verify` runs it whole.

python tests/verify.py --small                                          # minutes, needs no files
python tests/verify.py --root data --run runs/mnist/vae --out docs/verification.md
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from verification import Row, annealing, coverage, mnist_vae, pairs, reproducibility, two_modes  # noqa: E402

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


def every_row(small: bool, root: str | None, run: Path | None) -> Iterator[Row]:
    yield from coverage.rows(small)
    yield from two_modes.rows(small)
    yield from annealing.rows(small, root)
    if not small:
        yield from mnist_vae.rows(mnist_vae.open_or_fit(run, root))
    yield from pairs.rows(small)
    yield from reproducibility.rows(small)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer repeats, digits for MNIST")
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies")
    parser.add_argument("--run", type=Path, default=Path("runs/mnist/vae"), help="the VAE; fitted if it is not there")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file to write")
    arguments = parser.parse_args()
    started, lines, failed = time.perf_counter(), [], 0
    for row in every_row(arguments.small, arguments.root, arguments.run):
        mark = "holds" if row.holds else "**fails**"
        failed += not row.holds
        lines.append(f"| {mark} | {row.item} | {row.case} | {row.seen} | {row.asked} |")
        print(lines[-1], flush=True)
    minutes = (time.perf_counter() - started) / 60
    machine = f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"
    if arguments.out is not None:
        head = HEAD.format(seed=SEED, machine=machine, minutes=minutes)
        arguments.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - failed} of {len(lines)} hold; {minutes:.1f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
