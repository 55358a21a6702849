"""Energy models on MNIST's static bits: fit, log Z over again, and the held-out log p from both sides.

    python benchmarks/energy_mnist.py --data binarized_mnist.npz --out runs/energy --rows rbm_20 rbm_500

Each row is written to results/energy_mnist_ROW.json with the CPU seconds of the fit, of log Z and of both sides.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from report import machine

import pyro_vae as pv
from pyro_vae.configuration import Config
from pyro_vae.runs import fit_record, open_run, train

RESULTS = Path(__file__).parent / "results"
ROWS = {
    "rbm_20": {"model": "rbm", "options": {"hidden_dim": 20}, "fit": {"num_epochs": 10, "log_z_steps": 0}},
    "rbm_500": {"model": "rbm", "options": {}, "fit": {"num_epochs": 50, "log_z_steps": 0}},
    "energy": {"model": "energy", "options": {}, "fit": {"num_epochs": 8, "learning_rate": 5e-4, "log_z_steps": 0}},
}


def main() -> None:
    """Fit what is not there yet, then score it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["rbm_20", "rbm_500"])
    parser.add_argument("--steps", type=int, default=10_000, help="of log Z, with four seeds, and doubled once")
    parser.add_argument("--chains", type=int, default=256, help="of each run of log Z")
    parser.add_argument("--lower-steps", type=int, default=5000)
    parser.add_argument("--lower-chains", type=int, default=10)
    parser.add_argument("--lower-data", type=int, default=100)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for row in asked.rows:
        path = RESULTS / f"energy_mnist_{row}.json"
        path.write_text(json.dumps(measure(row, asked), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def measure(row: str, asked: argparse.Namespace) -> dict[str, object]:
    """The figures of one row."""
    folder = asked.out / row
    if not (folder / "fit.json").is_file():
        train(Config(data=asked.data, seed=0, **ROWS[row]), folder)
    run = open_run(folder)
    model, start = run.model, time.process_time()
    found = model.estimate_log_partition(asked.steps, num_chains=asked.chains)
    log_z_seconds, start = time.process_time() - start, time.process_time()
    both = pv.bracket(asked.lower_steps, asked.lower_chains, asked.lower_data)
    result = pv.log_likelihood(model, run.data.test, estimator=both, device="cpu")
    seconds = time.process_time() - start
    result.save(folder / "evaluation.npz")
    exact = model.sum_log_partition() if row == "rbm_20" else None
    return {
        "row": row,
        **machine(torch.device("cpu")),
        "fit_cpu_seconds": fit_record(folder)["cpu_seconds"],
        "log_z_cpu_seconds": log_z_seconds,
        "both_sides_cpu_seconds": seconds,
        "log_z": found.log_z,
        "log_z_se": found.se,
        "log_z_of_each_seed": [each.log_z for each in found.repeats],
        "log_z_doubled": found.doubled.log_z,
        "log_z_exact": exact,
        **result.summary(),
    }


if __name__ == "__main__":
    main()
