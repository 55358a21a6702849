"""Log Z of restricted Boltzmann machines along four paths: where the hidden bits start, and how β goes to 1.

    python benchmarks/annealing_paths.py runs/energy/rbm_500 runs/rbm_100 --steps 2000

Each row of results/annealing_paths.json has the mean and the scatter of log Z over seeds, the same for each path, and
the mean of its own standard error, too small where few chains carry the mean. The second run is `pyro-vae train --model
rbm --data digits --space binary --set hidden_dim=100 --fit num_epochs=200 --fit learning_rate=2e-2
--fit log_z_steps=2000`.
"""

import argparse
import pathlib
import statistics

import torch
from report import Report, machine

from pyro_vae.annealing import LogPartition, exponential_schedule, log_partition, sigmoid_schedule
from pyro_vae.log_partition import Path
from pyro_vae.models import RBM
from pyro_vae.runs import open_run

RESULTS = pathlib.Path(__file__).parent / "results" / "annealing_paths.json"
SCHEDULES = {"exponential": exponential_schedule, "sigmoid": sigmoid_schedule}


def scattered(path: Path, num_chains: int, num_seeds: int) -> list[LogPartition]:
    """Log Z along one path by several seeds."""
    return [log_partition(path, lambda: path.start(num_chains), seed=seed) for seed in range(num_seeds)]


def main() -> None:
    """Four rows for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="of a restricted Boltzmann machine, fitted")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    setting = {"steps": asked.steps, "chains": asked.chains, "seeds": asked.seeds}
    report = Report(RESULTS, {"benchmark": "annealing_paths", "setting": setting, **machine(torch.device("cpu"))})
    for run in asked.runs:
        model = open_run(run).model
        if not isinstance(model, RBM):
            parser.error(f"{run} holds a {type(model).__name__}, and not an RBM")
        shares = model.hidden_base_logits.clone()
        for start, logits in {"shares of the data": shares, "one half": torch.zeros_like(shares)}.items():
            model.hidden_base_logits.copy_(logits)
            for name, schedule in SCHEDULES.items():
                found = scattered(model.path(asked.steps, schedule), asked.chains, asked.seeds)
                log_z = [each.log_z for each in found]
                report.add(
                    run=run.name,
                    hidden_bits=len(shares),
                    hidden_bits_start_from=start,
                    schedule=name,
                    mean_log_z=statistics.mean(log_z),
                    sd_log_z=statistics.stdev(log_z),
                    mean_se=statistics.mean(each.se for each in found),
                )


if __name__ == "__main__":
    main()
