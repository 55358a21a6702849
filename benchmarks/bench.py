"""Every speed that the project promises on this machine, as ratios measured in one run: `make bench`.

python benchmarks/bench.py            # all files of `PARTS`, one after the other, then the table
python benchmarks/bench.py --table    # the table of what is there

Each part writes benchmarks/results/bench_<part>.json with machine, versions, threads and commit.
"""

import argparse
import json
import subprocess
import sys
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
    found = [json.loads(path.read_text()) for part in parts if (path := arguments.out / f"bench_{part}.json").is_file()]
    print("\n".join(table(found)))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def table(reports: list[dict[str, Any]]) -> list[str]:
    """Markdown: every row with its ratio, the range over the rounds, the bar and whether it holds."""
    lines = ["| row | here | range | bar | holds | moonshot |", "|" + "---|" * 6]
    for report in reports:
        for row in report["rows"]:
            if "bar" in row:
                low, high = row["range"]
                lines.append(
                    f"| {row['row']} | {row['ratio']:.3g} | {low:.3g} to {high:.3g} | {row['bar'] or ''} "
                    f"| {HOLDS[row.get('holds')]} | {row['moonshot'] or ''} |"
                )
    return lines


if __name__ == "__main__":
    main()
