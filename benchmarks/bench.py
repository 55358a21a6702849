"""Every speed that the project promises on this machine, as ratios measured in one run: `make bench`.

python benchmarks/bench.py            # all files of `PARTS`, one after the other, then the table
python benchmarks/bench.py --table    # the table of what is there
python benchmarks/bench.py --table --parts gpu_cuda    # and of what benchmarks/gpu.py wrote on a GPU

Each part writes benchmarks/results/bench_<part>.json with machine, versions, threads and commit.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = ("train_step", "importance", "mixtures", "scaling")
HOLDS = {True: "yes", False: "no", None: ""}
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between them")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    parts, failed = arguments.parts.split(","), []
    for part in () if arguments.table else parts:
        command = [sys.executable, str(HERE / f"{part}.py"), "--root", arguments.root, "--out", str(arguments.out)]
        if subprocess.run(command).returncode:
            failed.append(part)
    print("\n".join(table(read(arguments.out, parts))))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def read(folder: Path, parts: Sequence[str]) -> list[dict[str, Any]]:
    """The reports that are there: bench_<part>.json, or <part>.json of another benchmark."""
    paths = [folder / f"{prefix}{part}.json" for part in parts for prefix in ("bench_", "")]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def table(reports: list[dict[str, Any]]) -> list[str]:
    """Markdown: every row with its ratio, or its seconds, the range over the rounds, the bar and whether it holds."""
    lines = ["| row | here | range | bar | holds | moonshot |", "|" + "---|" * 6]
    for report in reports:
        for row in report["rows"]:
            if "bar" in row:
                (low, high), value = row["range"], row.get("ratio", row.get("seconds"))
                lines.append(
                    f"| {row['row']} | {value:.3g} | {low:.3g} to {high:.3g} | {row['bar'] or ''} "
                    f"| {HOLDS[row.get('holds')]} | {row['moonshot'] or ''} |"
                )
    return lines


if __name__ == "__main__":
    main()
