"""The twelve MNIST cells of Table 1 of the IWAE paper: VAE and IWAE, k = 1, 5, 50, one and two stochastic layers.

python benchmarks/iwae_table.py --root data                        # on a GPU: the whole, within 10 minutes
python benchmarks/iwae_table.py --root data --device cpu --small   # fewer epochs and test images, the same cells
python benchmarks/iwae_table.py --device cpu --small --table       # print what is there, and whether the order holds

Negative log-likelihood in nats by importance sampling with 5,000 particles, as in the paper, log p by multilevel
estimation with a refined proposal, and active units. With k = 1 VAE and IWAE are one model, which is fitted once. All
cells get equally many epochs: those of the setting, or as many as the budget allows, for which a part of an epoch of
every cell is timed first, with as many side by side as there will be. The cells are saved as they end, and one that
was saved by the same commit on the same kind of machine under the same setting is not fitted again.

The small setting gives the IWAE's bound its doubly reparameterised gradient. With the gradient as it stands, the guide
of the two-layer cells learns too slowly for few epochs to show the paper's order.

Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519, Table 1; Tucker,
Lawson, Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019, arXiv:1810.04152.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import Report, machine, paired_gain, per_image, timed
from torch import nn

import pyro_vae as pv
from pyro_vae.data import Data
from pyro_vae.randomness import own_randomness
from pyro_vae.study import num_cores

Cell = tuple[int, str, int]  # stochastic layers, "vae" or "iwae", k
PAPER: dict[Cell, float] = {  # negative log-likelihood, nats
    (1, "vae", 1): 86.76,
    (1, "vae", 5): 86.47,
    (1, "vae", 50): 86.35,
    (1, "iwae", 1): 86.76,
    (1, "iwae", 5): 85.54,
    (1, "iwae", 50): 84.78,
    (2, "vae", 1): 85.33,
    (2, "vae", 5): 85.01,
    (2, "vae", 50): 84.78,
    (2, "iwae", 1): 85.33,
    (2, "iwae", 5): 83.89,
    (2, "iwae", 50): 82.90,
}
FITTED = sorted(
    (cell for cell in PAPER if cell[1:] != ("iwae", 1)), key=lambda cell: (-cell[2], -cell[0])
)  # long first


@dataclass(frozen=True)
class Setting:
    """What is fitted and scored, and for how long."""

    batch_size: int = 250
    schedule: str = "one_cycle"
    learning_rate: float = 2e-3
    epochs: int | None = None  # of every cell; what the budget allows if None
    num_train: int = 50_000
    num_test: int = 10_000
    num_particles: int = 5000
    num_refined: int = 1000  # of the test images, also scored by multilevel estimation
    budget: float = 420.0  # seconds for all fits
    max_epochs: int = 3280  # the paper's
    gradient: str = "iwae"  # of the IWAE's bound: as it stands, or "dreg", of less noise for the guide
    compile: bool = True

    @staticmethod
    def small() -> "Setting":
        return Setting(batch_size=20, learning_rate=1e-3, epochs=12, num_test=1000, gradient="dreg")


@dataclass(frozen=True)
class Work:
    """Where the data are, what is done with them, and on what."""

    root: str
    setting: Setting
    device: str
    threads: int | None

    def data(self) -> Data:
        """MNIST, or a part of its training images whose bits are still drawn anew in each epoch."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        data = pv.load_data("mnist", root=self.root, seed=0)
        return part_of(data, self.setting.num_train, 1000)


def part_of(data: Data, num_train: int, num_valid: int) -> Data:
    """The same data with fewer of them to fit; bits are still drawn anew in each epoch."""
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:num_train].sort().values
    train = pv.Batch(data.train.obs[chosen], space=data.space)
    valid = data.valid.subset(min(num_valid, len(data.valid)))
    return replace(data, train=train, valid=valid, intensity=data.intensity[chosen])


def build(data: Data, layers: int) -> nn.Module:
    """784-200-200-50, or 784-200-200-100-100-100-50, and back, tanh; started as every cell of as many layers is."""
    with own_randomness(0):
        if layers == 1:
            return pv.models.VAE(data.space, latent_dim=50, hidden_dims=(200, 200))
        return pv.models.LadderVAE(data.space, latent_dims=(100, 50), hidden_dims=((200, 200), (100, 100)))


def fit(data: Data, cell: Cell, epochs: int, setting: Setting, device: str) -> tuple[nn.Module, pv.History]:
    """The VAE averages the ELBO over k draws, the IWAE takes the bound with k particles."""
    layers, kind, k = cell
    model = build(data, layers)
    how = {"batch_size": setting.batch_size, "schedule": setting.schedule, "learning_rate": setting.learning_rate}
    how |= {"objective": "elbo" if kind == "vae" else setting.gradient, "num_particles": k, "compile": setting.compile}
    history = pv.fit(model, data, num_epochs=epochs, validate_every=max(1, epochs // 20), device=device, seed=0, **how)
    return model, history


def epoch_seconds(work: Work, cell: Cell) -> float:
    """Seconds of one epoch: a part of one is timed, the third, when all that is compiled has been."""
    data = work.data()
    few = part_of(data, min(20 * work.setting.batch_size, len(data.train)), 100)
    before, after = (row["seconds"] for row in fit(few, cell, 3, work.setting, work.device)[1].rows[-2:])
    return (after - before) * len(data.train) / len(few.train)


def measure(work: Work, cell: Cell, epochs: int) -> dict[str, Any]:
    """Fit and score one cell."""
    data, device, setting = work.data(), torch.device(work.device), work.setting
    cpu = time.process_time()
    (model, history), fit_seconds = timed(device, lambda: fit(data, cell, epochs, setting, work.device))
    cpu = time.process_time() - cpu
    test = data.test.subset(setting.num_test)
    few = test if setting.num_refined >= len(test) else test.subset(setting.num_refined)
    score = partial(pv.log_likelihood, model, device=work.device, seed=0)
    found, seconds = timed(device, lambda: score(test, estimator=pv.importance_sampling(setting.num_particles)))
    best, best_seconds = timed(device, lambda: score(few, estimator=pv.multilevel(500, proposal=pv.refined())))
    return {
        "nll": -found.mean,
        "test_se": found.test_se,
        "mc_se": found.mc_se,
        "k_hat_high": found.frac_khat_high,
        "elbo": float(found.elbo.mean()),
        "log_prob_multilevel": best.mean,
        "log_prob_multilevel_se": best.mc_se,
        "warning": best.interval().warning,
        "active_units": pv.latent_use(model, few, device=work.device).num_active,
        "ran_as": history.ran_as,
        "fit_seconds": fit_seconds,
        "fit_cpu_seconds": cpu,
        "seconds": seconds,
        "multilevel_seconds": best_seconds,
        "log_prob_per_image": per_image(found.log_prob),
    }


def in_parallel(jobs: int, task: Callable[[Cell], Any], cells: list[Cell]) -> Any:
    """(cell, what the task gave), as the cells end; what fails is raised once all others have ended."""
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(task, cell): cell for cell in cells}
        for future in as_completed(futures):
            if (error := future.exception()) is None:
                yield futures[future], future.result()
            else:
                failed.append(error)
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {len(cells)} cells failed", failed)


def epochs_within(work: Work, jobs: int) -> int:
    """The epochs that every cell can have, from the time of all cells side by side, as they will be fitted."""
    taken = dict(in_parallel(jobs, partial(epoch_seconds, work), FITTED))
    one_epoch = max(sum(taken.values()) / jobs, max(taken.values()))
    return max(1, min(work.setting.max_epochs, int(work.setting.budget / one_epoch)))


def opened(path: Path, setting: Setting, device: torch.device) -> Report:
    """The report with the cells that this code saved under this setting, if there are any."""
    report = Report(path, {"benchmark": "iwae_table", "setting": asdict(setting), "epochs": None, **machine(device)})
    if path.is_file():
        saved = json.loads(path.read_text())
        is_known = saved["commit"] is not None and "changed" not in saved["commit"]
        if is_known and all(saved[key] == report.contents[key] for key in ("setting", "device", "torch", "commit")):
            report.contents = {**saved, "rows": [row for row in saved["rows"] if "nll" in row]}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="12 epochs of batches of 20, 1,000 test images")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--schedule", choices=["one_cycle", "cosine", "constant"])
    parser.add_argument("--gradient", choices=["iwae", "dreg"], help="of the IWAE's bound")
    parser.add_argument("--compile", choices=["True", "False"], help="whether the steps are compiled")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--budget", type=float, help="seconds for all fits, where no epochs are given")
    parser.add_argument("--epochs", type=int, help="of every cell, whatever that takes")
    parser.add_argument("--num-train", type=int, help="training images")
    parser.add_argument("--num-test", type=int, help="test images")
    parser.add_argument("--jobs", type=int, help="cells side by side; on a CPU one per core, on a GPU all")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    names = ("batch_size", "schedule", "gradient", "learning_rate", "budget", "epochs", "num_train", "num_test")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.compile is not None:
        given["compile"] = arguments.compile == "True"
    setting = replace(Setting.small() if arguments.small else Setting(), **given)
    path = arguments.out / f"iwae_table_{device.type}{'_small' if arguments.small else ''}.json"
    if arguments.table:
        print("\n".join(table(json.loads(path.read_text()))))
        return
    on_cpu = device.type == "cpu"
    jobs = arguments.jobs or (num_cores() if on_cpu else len(FITTED))
    work = Work(arguments.root, setting, arguments.device, 1 if on_cpu or jobs > 1 else None)
    report, started = opened(path, setting, device), time.perf_counter()
    there = {(row["layers"], row["objective"], row["k"]) for row in report.contents["rows"]}
    epochs = report.contents["epochs"] or setting.epochs or epochs_within(work, jobs)
    report.contents |= {"epochs": epochs, "jobs": jobs}
    missing = [cell for cell in FITTED if cell not in there]
    for (layers, kind, k), row in in_parallel(jobs, partial(measure, work, epochs=epochs), missing):
        report.add(layers=layers, objective=kind, k=k, paper=PAPER[layers, kind, k], **row)
    report.add(total_seconds=time.perf_counter() - started)
    print("\n".join(table(report.contents)))


def table(contents: dict[str, Any]) -> list[str]:
    """Markdown: the cells beside the paper's, and the paper's order, each neighbour by a paired difference."""
    rows = {(row["layers"], row["objective"], row["k"]): row for row in contents["rows"] if "nll" in row}
    rows |= {(layers, "iwae", 1): row for (layers, kind, k), row in rows.items() if (kind, k) == ("vae", 1)}
    lines = ["| layers | objective | k | paper | IS, K = 5000 | multilevel, refined | active units |", "|" + "---|" * 7]
    for cell in filter(rows.get, PAPER):
        row = rows[cell]
        doubt = " ?" if row["warning"] else ""
        best = f"{-row['log_prob_multilevel']:.2f} ({row['log_prob_multilevel_se']:.3f}){doubt}"
        lines.append(f"| {cell[0]} | {cell[1].upper()} | {cell[2]} | {PAPER[cell]:.2f} | {row['nll']:.2f} | {best} ")
        lines[-1] += f"| {row['active_units']} |"
    lines += ["", "| better | than | paper, nats | here, nats (SE) |", "|" + "---|" * 4]
    for better, worse in ORDER:
        if better in rows and worse in rows:
            there = PAPER[worse] - PAPER[better]
            gain = paired_gain(*(rows[cell]["log_prob_per_image"] for cell in (better, worse)))
            lines.append(f"| {_words(better)} | {_words(worse)} | {there:.2f} | {gain} |")
    return lines


def _order() -> list[tuple[Cell, Cell]]:
    """(better, worse) as the paper has them: more particles, the IWAE's bound, two layers."""
    kinds = [(layers, kind) for layers in (1, 2) for kind in ("vae", "iwae")]
    more = [((*which, larger), (*which, k)) for which in kinds for k, larger in ((1, 5), (5, 50))]
    bound = [((layers, "iwae", k), (layers, "vae", k)) for layers in (1, 2) for k in (5, 50)]
    depth = [((2, *cell[1:]), cell) for cell in PAPER if cell[0] == 1 and cell[1:] != ("iwae", 1)]
    return more + bound + depth


ORDER = _order()


def _words(cell: Cell) -> str:
    return f"{cell[1].upper()}, k = {cell[2]}, {cell[0]} layer{'s' * (cell[0] > 1)}"


if __name__ == "__main__":
    main()
