"""Held-out log p of a missing quadrant: VAE, CVAE, PPCA and independent pixels in one table, on real pixels.

python benchmarks/restoration.py                                  # the embedded digits
python benchmarks/restoration.py --data mnist --root data --num-data 500 --epochs 20
"""

import argparse
import time
from pathlib import Path

import torch
from report import Report, figures, machine

import pyro_vae as pv

LATENT_DIM = {"digits": 8, "mnist": 50}
QUADRANTS = 3  # given; the bottom right one is missing


def fitted(data, given, name, epochs):
    """The four models, and the CPU seconds of their fits."""
    size = LATENT_DIM.get(name, 20)
    torch.manual_seed(0)
    models = {
        "vae": (pv.models.VAE(data.space, latent_dim=size), data),
        "cvae": (pv.models.CVAE(given.space, given.context, latent_dim=size), given),
        "ppca": (pv.models.PPCA(data.space, latent_dim=size), data),
        "independent_pixel": (pv.models.IndependentPixel(data.space), data),
    }
    seconds = {}
    for row, (model, of) in models.items():
        started, settings = time.process_time(), {}
        if row in ("vae", "cvae"):
            settings = {"num_epochs": epochs, "batch_size": 64 if name == "digits" else 128, "learning_rate": 2e-3}
        pv.fit(model, of, seed=0, **settings)
        seconds[row] = time.process_time() - started
    return {row: model for row, (model, _) in models.items()}, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root")
    parser.add_argument("--num-data", type=int)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/restoration"), help="folder of pictures, comparison.json"
    )
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file"
    )
    arguments = parser.parse_args()
    data = pv.load_data(arguments.data, space="real", root=arguments.root, seed=0)
    models, seconds = fitted(data, data.given("quadrants", QUADRANTS), arguments.data, arguments.epochs)
    batch = data.test if arguments.num_data is None else data.test.subset(arguments.num_data, 0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    setting = {"data": data.name, "epochs": arguments.epochs, "quadrants": QUADRANTS}
    header = {"benchmark": "restoration", "setting": setting, **machine(torch.device("cpu"))}
    report = Report(arguments.results / f"restoration_{data.name}.json", header)
    results = {}
    for row, model in models.items():
        started = time.process_time()
        found = pv.restore(model, batch, pv.Quadrants(QUADRANTS, data.space.shape), num_draws=16, seed=0)
        results[row] = found.log_prob
        missing = found.missing
        error = float((found.mean - batch.obs)[:, missing].square().mean().sqrt())
        seen = pv.plot_restoration(found, batch, batch.obs, arguments.out / f"{row}.png")
        cpu = {"fit_cpu_seconds": seconds[row], "cpu_seconds": time.process_time() - started}
        report.add(model=row, how=found.how, rmse_of_mean=error, picture=seen.name, **cpu, **figures(found.log_prob))
    comparison = pv.compare(results, train_seconds=seconds)
    print(comparison.report())
    print(comparison.to_json(arguments.out / "restoration.json", data_name=data.name))


if __name__ == "__main__":
    main()
