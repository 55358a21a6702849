"""What a guide, a prior and an objective buy on MNIST: one decoder, 784-200-200-50, one budget, one core each.

python benchmarks/posteriors_mnist.py --root data                               # every row, about 2 hours on one core
python benchmarks/posteriors_mnist.py --root data --rows mean_field spline      # some of them
python benchmarks/posteriors_mnist.py --static binarized_mnist.npz --rows static_vae static_iwae static_vamp

Each row is fitted, scored on a seeded subset of the test images, and saved as it ends in a file of its own: the ELBO
and the importance weighted bound by the guide's own draws, and log p by multilevel estimation with a refined proposal.
`--table` prints the rows that are there.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from report import Report, figures, machine, paired_gain, per_image

import pyro_vae as pv
from pyro_vae.randomness import own_randomness
from pyro_vae.recipes import NET_LARGE

FIT = {"batch_size": 128, "learning_rate": 2e-3, "validate_every": 5}


@dataclass(frozen=True)
class Row:
    """What differs from the VAE with a mean-field guide, a standard normal prior and the ELBO."""

    epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)


IWAE = {"objective": "iwae", "num_particles": 50}
ROWS = {
    "mean_field": Row(50),
    "full_covariance": Row(50, {"guide": "full_covariance"}),
    "inverse_autoregressive": Row(50, {"guide": "inverse_autoregressive"}),
    "spline": Row(50, {"guide": "spline"}),
    "mixture": Row(50, {"guide": "mixture"}),
    "semi_amortized": Row(50, {"guide": "semi_amortized", "guide_options": {"num_steps": 3, "num_samples": 4}}),
    "vamp": Row(50, {"prior": "vamp"}),
    "elbo_20": Row(20),
    "iwae_20": Row(20, fit=IWAE),
    "static_vae": Row(50),
    "static_vamp": Row(50, {"prior": "vamp"}),
    "static_iwae": Row(20, fit=IWAE),
}


def measure(name: str, data: pv.Data, out: Path, num_test: int, epochs: int | None) -> None:
    """Fit and score one row."""
    row = ROWS[name]
    report = Report(out / f"{name}.json", {"benchmark": "posteriors_mnist", **machine(torch.device("cpu"))})
    with own_randomness(0):
        model = pv.models.VAE(data.space, **NET_LARGE, **row.options)
    how = {**FIT, **row.fit, "num_epochs": epochs or row.epochs}
    cpu = time.process_time()
    history = pv.fit(model, data, seed=0, **how)
    cpu = time.process_time() - cpu
    test = data.test.subset(num_test, seed=0)
    bound = pv.log_likelihood(model, test, estimator=pv.importance_sampling(1000), seed=0)
    best = pv.log_likelihood(model, test, estimator=pv.multilevel(500, proposal=pv.refined()), seed=0)
    interval = best.interval()
    report.add(
        row=name,
        options=row.options,
        fit=how,
        fit_seconds=history.seconds,
        fit_cpu_seconds=cpu,
        elbo=float(bound.elbo.mean()),
        elbo_se=float(math.sqrt((bound.spread / bound.num_particles).sum()) / len(bound)),
        bound_1000=bound.mean,
        log_prob_low=interval.low,
        log_prob_high=interval.high,
        warning=interval.warning,
        log_prob_per_image=per_image(best.log_prob),
        elbo_per_image=per_image(bound.elbo),
        **figures(best),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--static", type=Path, help="an .npz of bits in train, valid and test, for the rows static_*")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[name for name in ROWS if "static" not in name])
    parser.add_argument("--epochs", type=int, help="in place of each row's own")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "posteriors_mnist")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table(arguments.out)))
        return
    torch.set_num_threads(1)
    for name in arguments.rows:
        if name.startswith("static") and arguments.static is None:
            parser.error(f"{name} needs --static")
        source = arguments.static if name.startswith("static") else "mnist"
        measure(
            name, pv.load_data(source, root=arguments.root, seed=0), arguments.out, arguments.num_test, arguments.epochs
        )


BASES = {"elbo_20": "elbo_20", "iwae_20": "elbo_20"}  # what a row is compared with, if not with "mean_field"


def table(out: Path) -> list[str]:
    """A Markdown table: the ELBO's gain over the base, how much of it is a better p(x), and the gap that is left."""
    found = {p.stem: json.loads(p.read_text())["rows"][0] for p in out.glob("*.json")}
    lines = ["| row | epochs | ELBO | log p(x) | gap | ELBO gain | log p gain (SE) | fit, CPU min |", "|" + "---|" * 8]
    for name in filter(found.get, ROWS):
        row = found[name]
        base = found.get("static_vae" if name.startswith("static") else BASES.get(name, "mean_field"))
        gain, log_gain = (
            ("—", "—")
            if base is None
            else (paired_gain(row[f"{kind}_per_image"], base[f"{kind}_per_image"]) for kind in ("elbo", "log_prob"))
        )
        mean = row["mean_log_prob"]
        cells = [name, row["fit"]["num_epochs"], f"{row['elbo']:.2f}", f"~ {mean:.2f} ({row['mc_se']:.3f})"]
        cells += [f"{mean - row['elbo']:.2f}", gain, log_gain, f"{row['fit_cpu_seconds'] / 60:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
