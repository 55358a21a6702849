"""A GAN beside a VAE with the same decoder on continuous MNIST, by annealing: Wu et al. 2017 on one core of a CPU.

python benchmarks/gan.py --root data            # fits of 10 and 15 epochs, 100 test images; 45 minutes of a core
python benchmarks/gan.py --root data --small    # fits of a few minutes, fewer images and steps
python benchmarks/gan.py --table                # print what is there

GAN-10 and VAE-10: codes of 10 dimensions, decoder 10-64-256-256-1024-784 with tanh, logistic means in [0, 1], normal
noise with one σ for all pixels: fitted after the training of the GAN, learned by the VAE. The images are grey levels
x in 0..255 as y = (x + u)/256, and log p(y) is a density over [0, 1]^784 in nats, the library's scale and the paper's.
Each model is scored on the same test images by annealed importance sampling from the prior, with its gap between lower
and upper bounds on simulated data (bidirectional Monte Carlo); by importance sampling with its guide, which for the GAN
is the prior; and by the kernel density estimate from the generator's means. The runs lie in --runs; one that is there
with the same configuration is not fitted again.

Source: Wu, Burda, Salakhutdinov, Grosse, "On the quantitative analysis of decoder-based generative models", 2017,
arXiv:1611.04273.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from report import Report, figures, machine, paired_gain, per_image, timed
from torch import Tensor

import pyro_vae as pv
from pyro_vae.configuration import Config
from pyro_vae.randomness import own_randomness
from pyro_vae.runs import Run, fit_record, open_run, train

CPU = torch.device("cpu")
DECODER = (1024, 256, 256, 64)  # from the image on, as `hidden_dims` has it
PAPER = {  # nats
    "vae": {"ais": 705.4, "gap": 0.83, "kde": 409},
    "gan": {"ais": 328.8, "gap": 0.93, "kde": 260},
}


@dataclass(frozen=True)
class Setting:
    """How long is fitted, and how much is spent on a score; the paper annealed in 10,000 steps."""

    num_epochs_vae: int = 15
    num_epochs_gan: int = 10
    num_test: int = 100
    num_steps: int = 300  # T
    num_chains: int = 16
    num_leapfrog: int = 10
    num_simulated: int = 20  # data of the certificate
    num_particles: int = 5000  # of importance sampling
    num_samples: int = 10_000  # of the kernel density estimate
    num_valid: int = 1000  # images that choose its bandwidth

    @staticmethod
    def small() -> "Setting":
        return Setting(3, 3, num_test=20, num_steps=100, num_simulated=5, num_particles=1000)


def configuration(model: str, root: str, setting: Setting) -> Config:
    wide: dict[str, Any] = {"latent_dim": 10, "hidden_dims": DECODER}
    if model == "gan":
        fit = {"num_epochs": setting.num_epochs_gan, "batch_size": 64, "learning_rate": 3e-4, "penalty": 1.0}
    else:
        fit = {"num_epochs": setting.num_epochs_vae, "batch_size": 100, "learning_rate": 1e-3}
        wide["observation"] = "spherical"
    return Config(model, data="mnist", root=root, space="real", options=wide, fit=fit)


def fitted(model: str, root: str, setting: Setting, runs: Path) -> Run:
    """The run in `runs`, or a new one if what is there is another."""
    config, out = configuration(model, root, setting), runs / model
    if (out / "fit.json").is_file() and replace(Config.load(out / "config.json"), root=root) == config:
        return open_run(out, root=root)
    return train(config, out, overwrite=True)[0]


def measure(run: Run, setting: Setting) -> dict[str, Any]:
    """All figures of one model."""
    test, cpu = run.data.test.subset(setting.num_test), time.process_time()
    chains = {"num_chains": setting.num_chains, "num_leapfrog": setting.num_leapfrog, "start": "prior"}
    annealing = pv.sandwich(num_steps=setting.num_steps, num_simulated=setting.num_simulated, **chains)
    annealed, seconds = timed(CPU, lambda: pv.log_likelihood(run.model, test, estimator=annealing, device="cpu"))
    cpu = time.process_time() - cpu
    sampling = pv.importance_sampling(setting.num_particles)
    sampled = pv.log_likelihood(run.model, test, estimator=sampling, device="cpu")
    window = pv.parzen_window(means(run, setting.num_samples), run.data.valid.subset(setting.num_valid).obs, test.obs)
    record = fit_record(run.path)
    return {
        "scale": float(run.model.observation.log_scale.detach().exp()),
        "ais": figures(annealed),
        "certificate": asdict(annealed.certificate),
        "ais_warning": annealed.warning,
        "ais_seconds": seconds,
        "ais_cpu_seconds": cpu,
        "is": figures(sampled),
        "is_warning": sampled.warning,
        "is_flagged": float(sampled.flagged.mean()),
        "elbo": None if sampled.elbo is None else float(sampled.elbo.mean()),
        "kde": float(window.log_density.mean()),
        "kde_bandwidth": window.bandwidth,
        "kde_bandwidth_is_at_end": window.is_at_end,
        "fit_seconds": record["seconds"],
        "fit_cpu_seconds": record["cpu_seconds"],
        "ais_per_image": per_image(annealed.log_prob),
        "kde_per_image": per_image(window.log_density.numpy()),
    }


@torch.no_grad()
def means(run: Run, count: int) -> Tensor:
    """Means of p(x | z) at draws of the prior, the generator's images without noise, (count, *shape)."""
    with own_randomness(0):
        return run.model.likelihood(torch.randn(count, run.model.latent_dim)).mean


def table(contents: dict[str, Any]) -> list[str]:
    """Markdown: both models beside the paper's, then their paired difference."""
    rows = {row["model"]: row for row in contents["rows"]}
    lines = ["| model | AIS (SE over images) | BDMC gap (SE) | KDE | IS, its warning | paper: AIS, gap, KDE |"]
    lines.append("|" + "---|" * 6)
    for model, row in rows.items():
        ais, certificate, paper = row["ais"], row["certificate"], PAPER[model]
        cells = [
            f"{model.upper()}-10",
            f"{ais['mean_log_prob']:.1f} ({ais['test_se']:.1f})",
            f"{certificate['gap']:.2f} ({certificate['gap_se']:.2f})",
            f"{row['kde']:.1f}",
            f"{row['is']['mean_log_prob']:.1f}, {row['is_warning'] or 'none'}",
            f"{paper['ais']}, {paper['gap']}, {paper['kde']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(rows) == len(PAPER):
        gain = paired_gain(rows["vae"]["ais_per_image"], rows["gan"]["ais_per_image"])
        lines += ["", f"VAE-10 less GAN-10, the same images: {gain} nats"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--small", action="store_true", help="3 epochs, 20 images, 100 steps")
    parser.add_argument("--num-steps", type=int, help="T of annealing")
    parser.add_argument("--num-test", type=int, help="test images")
    parser.add_argument("--runs", type=Path, default=Path("runs/gan"), help="where the fitted models lie or go")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    parser.add_argument("--table", action="store_true", help="print what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / f"gan{'_small' if arguments.small else ''}.json"
    if arguments.table:
        print("\n".join(table(json.loads(path.read_text()))))
        return
    given = {name: value for name in ("num_steps", "num_test") if (value := getattr(arguments, name)) is not None}
    setting = replace(Setting.small() if arguments.small else Setting(), **given)
    header = {"benchmark": "gan", "setting": asdict(setting), "decoder": [10, *DECODER[::-1], 784], **machine(CPU)}
    report = Report(path, header)
    for model in PAPER:
        runs = arguments.runs / ("small" if arguments.small else "whole")
        report.add(model=model, **measure(fitted(model, arguments.root, setting, runs), setting))
    print("\n".join(table(report.contents)))


if __name__ == "__main__":
    main()
