"""The twelve MNIST cells of Table 1 of the IWAE paper: VAE and IWAE, k = 1, 5, 50, one and two stochastic layers.

python benchmarks/iwae_table.py --root data                        # on a GPU: the whole, within 10 minutes
python benchmarks/iwae_table.py --root data --device cpu --small   # smaller data and fewer epochs, the same cells

Negative log-likelihood in nats by importance sampling with 5,000 particles, and active units. With k = 1 VAE and IWAE
are one model, which is fitted once. All cells get equally many epochs, as many as the budget allows: a few steps of
each are timed first. The cells are saved as they end.

Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519, Table 1.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gpu import Report, machine, timed
from torch import nn

import pyro_vae as pv
from pyro_vae.data import Data
from pyro_vae.randomness import own_randomness

PAPER = {  # (layers, objective, k): negative log-likelihood in nats
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


@dataclass(frozen=True)
class Setting:
    """What is fitted and scored, and for how long."""

    batch_size: int = 250
    schedule: str = "one_cycle"
    learning_rate: float = 2e-3
    num_train: int = 50_000
    num_test: int = 10_000
    num_particles: int = 5000
    budget: float = 480.0  # seconds for all fits
    max_epochs: int = 3280  # the paper's

    @staticmethod
    def small() -> "Setting":
        return Setting(batch_size=100, num_train=10_000, num_test=500, num_particles=1000, budget=700.0)


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


def objective(kind: str, k: int) -> dict[str, object]:
    """The VAE averages the ELBO over k draws, the IWAE takes the bound with k particles."""
    return {"objective": "elbo" if kind == "vae" else "iwae", "num_particles": k}


def fit(data: Data, layers: int, kind: str, k: int, epochs: int, setting: Setting, device: torch.device) -> nn.Module:
    model = build(data, layers)
    how = {"batch_size": setting.batch_size, "schedule": setting.schedule, "learning_rate": setting.learning_rate}
    every = max(1, epochs // 20)
    pv.fit(model, data, num_epochs=epochs, validate_every=every, device=device, seed=0, **how, **objective(kind, k))
    return model


def epochs_within(data: Data, setting: Setting, device: torch.device, cells: list[tuple[int, str, int]]) -> int:
    """The epochs that every cell can have: one epoch over a part of the data is timed for each, after a warm-up."""
    few = part_of(data, min(10 * setting.batch_size, len(data.train)), 100)
    seconds = 0.0
    for cell in cells:
        fit(few, *cell, 1, setting, device)
        _, taken = timed(device, lambda cell=cell: fit(few, *cell, 1, setting, device))
        seconds += taken * len(data.train) / len(few.train)
    return max(1, min(setting.max_epochs, int(setting.budget / seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="10,000 training images, 12 minutes of fits on one core")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--schedule", choices=["one_cycle", "cosine", "constant"])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--budget", type=float, help="seconds for all fits")
    parser.add_argument("--epochs", type=int, help="of every cell, whatever that takes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    given = {
        name: value
        for name in ("batch_size", "schedule", "learning_rate", "budget")
        if (value := getattr(arguments, name)) is not None
    }
    setting = replace(Setting.small() if arguments.small else Setting(), **given)
    name = f"iwae_table_{device.type}{'_small' if arguments.small else ''}.json"
    data = pv.load_data("mnist", root=arguments.root, seed=0)
    data = part_of(data, setting.num_train, 1000)
    test = data.test.subset(setting.num_test)
    cells = [cell for cell in PAPER if cell[1:] != ("iwae", 1)]
    started = time.perf_counter()
    epochs = arguments.epochs or epochs_within(data, setting, device, cells)
    report = Report(
        arguments.out / name, {"benchmark": "iwae_table", "setting": vars(setting), "epochs": epochs, **machine(device)}
    )
    importance = pv.importance_sampling(setting.num_particles)
    for layers, kind, k in cells:
        model, fit_seconds = timed(device, lambda cell=(layers, kind, k): fit(data, *cell, epochs, setting, device))
        result, seconds = timed(
            device, lambda model=model: pv.log_likelihood(model, test, estimator=importance, device=device)
        )
        use = pv.latent_use(model, test.subset(min(1000, len(test))), device=device)
        row = {
            "nll": -result.mean,
            "test_se": result.test_se,
            "mc_se": result.mc_se,
            "k_hat_high": result.frac_khat_high,
            "active_units": use.num_active,
            "fit_seconds": fit_seconds,
            "seconds": seconds,
        }
        for each in (kind, "iwae") if k == 1 else (kind,):
            report.add(layers=layers, objective=each, k=k, paper=PAPER[layers, each, k], **row)
    report.add(total_seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
