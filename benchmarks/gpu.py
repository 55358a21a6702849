"""Fit and evaluate the MNIST table on one device; each row is saved as it ends.

python benchmarks/gpu.py --root data                        # on a GPU: the whole, under 10 minutes
python benchmarks/gpu.py --root data --device cpu --small   # the same code on a CPU, a few minutes
"""

import argparse
import math
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import train_step
from ratios import meets
from report import Report, figures, machine, peak_gib, timed

import pyro_vae as pv
from pyro_vae.recipes import FIT_LARGE, NET_LARGE

FULL = {"epochs": 400, "particles": 5000, "num_test": 10_000, "mixtures": (100, 500), "annealing": (10_000, 16, 1000)}
SMALL = {"epochs": 2, "particles": 200, "num_test": 200, "mixtures": (20,), "annealing": (10, 4, 16)}
TRAINING = {"handlers": False, "graph": None}  # of `train_step.WAYS`: inductor takes a minute for each
REPEATS = 3  # of what is timed by seconds; the median counts
SAMPLING_BARS = "<= 0.3", "<= 0.08"  # seconds of importance sampling, 10,000 images x 5,000 particles
ANNEALING_BARS = "<= 120", "<= 45"  # seconds, 1,000 images x 16 chains x 10,000 steps


def row(report: Report, device: torch.device, name: str, model, data, test, settings: dict, estimator) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    history, fit_seconds = timed(device, lambda: pv.fit(model, data, device=device, seed=0, **settings))
    result, seconds = timed(device, lambda: pv.log_likelihood(model, test, estimator=estimator, device=device))
    again = pv.log_likelihood(model, test.subset(min(100, len(test))), estimator=estimator, device=device)
    twice = pv.log_likelihood(model, test.subset(min(100, len(test))), estimator=estimator, device=device)
    common = {"model": name, "fit_seconds": fit_seconds, "fit_rows": len(history.rows), "peak_gib": peak_gib(device)}
    same = bool((again.log_prob == twice.log_prob).all())
    samples = max(1, result.num_particles) * len(result)
    rate = {"seconds": seconds, "image_samples_per_second": samples / seconds, "same_digits_twice": same}
    report.add(**common, **rate, **figures(result))
    if result.marginal is not None:
        report.add(model=f"{name}, marginal", **figures(result.marginal))


def agreement(report: Report, device: torch.device, vae, test) -> None:
    """The same parameters scored on this device and on the CPU: equal within the Monte Carlo error."""
    few = test.subset(min(50, len(test)), seed=1)
    estimator = pv.importance_sampling(num_particles=500)
    here = pv.log_likelihood(vae, few, estimator=estimator, device=device)
    cpu = pv.log_likelihood(vae, few, estimator=estimator, device="cpu", seed=1)
    error = math.hypot(here.mc_se, cpu.mc_se)
    report.add(model="vae, this device against the CPU", difference=here.mean - cpu.mean, mc_se=error, n=len(few))


def precisions(report: Report, device: torch.device, vae, test, num_particles: int, has_bars: bool) -> None:
    """Importance sampling with linear layers in every precision, after a run that does not count.

    "seconds" are the result's own, of the estimate: from the checks of the pair to the figures on the CPU. The whole
    call also checks the data and takes their SHA-256.
    """
    for precision in ("float32", "tf32", "float16"):
        estimator = pv.importance_sampling(num_particles, precision=precision)
        work = partial(pv.log_likelihood, vae, test, estimator=estimator, device=device)
        work()
        runs = [timed(device, work) for _ in range(REPEATS)]
        result, seconds = runs[0][0], [each.seconds for each, _ in runs]
        report.add(
            model=f"vae, {precision}",
            row=f"importance sampling, {len(test):,} images x {num_particles:,} particles, {precision}, seconds",
            **limits(seconds, SAMPLING_BARS if has_bars and precision != "float32" else None),
            whole_call_seconds=statistics.median(whole for _, whole in runs),
            image_samples_per_second=num_particles * len(test) / statistics.median(seconds),
            precision_error=result.summary().get("precision_error"),
            peak_gib=peak_gib(device),
            **figures(result),
        )


def limits(seconds: list[float], bars: tuple[str, str] | None) -> dict[str, object]:
    """Seconds, their range, and whether they are within what they were to be."""
    median, found = statistics.median(seconds), {"range": [min(seconds), max(seconds)], "rounds": len(seconds)}
    bar, moonshot = bars or (None, None)
    held = {"holds": meets(median, bar), "is_moonshot": meets(median, moonshot)} if bar and moonshot else {}
    return {"seconds": median, **found, "bar": bar, "moonshot": moonshot, **held}


def annealing(report: Report, device: torch.device, vae, test, size: tuple[int, int, int], has_bars: bool) -> None:
    """Annealed importance sampling from the prior, the long way: steps x chains x images in one go."""
    num_steps, num_chains, num_data = size
    few = test.subset(num_data, seed=0)
    estimator = pv.annealed_importance_sampling(num_steps, num_chains, start="prior")
    result, seconds = timed(device, lambda: pv.log_likelihood(vae, few, estimator=estimator, device=device))
    report.add(
        model="vae, annealed",
        row=f"annealing, T = {num_steps:,}, {num_chains} chains, {num_data:,} images, seconds",
        **limits([seconds], ANNEALING_BARS if has_bars else None),
        peak_gib=peak_gib(device),
        **figures(result),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    size = SMALL if arguments.small else FULL
    name = f"gpu_{device.type}{'_small' if arguments.small else ''}.json"
    report = Report(arguments.out / name, {"benchmark": "gpu", "setting": size, **machine(device)})
    data = pv.load_data("mnist", root=arguments.root, seed=0)
    labelled = data.given("label")
    tests = [
        split.test if size["num_test"] == len(split.test) else split.test.subset(size["num_test"])
        for split in (data, labelled)
    ]
    importance = pv.importance_sampling(num_particles=size["particles"])
    started = time.perf_counter()
    row(report, device, "independent_pixel", pv.models.IndependentPixel(data.space), data, tests[0], {}, pv.exact())
    for count in size["mixtures"]:
        mixture = pv.models.BernoulliMixture(data.space, num_components=count)
        row(report, device, f"bernoulli_mixture_{count}", mixture, data, tests[0], {}, pv.exact())
    for batch_size in (20, 128):
        train_step.rows(report, data, batch_size, device, TRAINING)
    settings = {**FIT_LARGE, "num_epochs": size["epochs"]}
    torch.manual_seed(0)
    vae = pv.models.VAE(data.space, **NET_LARGE)
    row(report, device, "vae", vae, data, tests[0], settings, importance)
    agreement(report, device, vae, tests[0])
    has_bars = device.type == "cuda" and not arguments.small
    precisions(report, device, vae, tests[0], size["particles"], has_bars)
    annealing(report, device, vae, tests[0], size["annealing"], has_bars)
    torch.manual_seed(0)
    cvae = pv.models.CVAE(data.space, labelled.context, **NET_LARGE)
    row(report, device, "cvae", cvae, labelled, tests[1], settings, importance)
    report.add(model="all", seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
