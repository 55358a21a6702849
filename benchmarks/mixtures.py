"""EM of a diagonal Gaussian mixture against scikit-learn: the same data, start and number of passes, on one thread.

python benchmarks/mixtures.py --root data        # about 3 minutes

Data: MNIST as `Real` pixels, (grey level + uniform noise) / 256 as stored in float32, 50,000 x 784 of them. Each pixel
varies by 1 / (256 √12) = 0.001 at least. Our least standard deviation, 0.0001, and scikit-learn's reg_covar, 1e-12, are
far below, so both climb the same likelihood.
Each task makes ITERATIONS updates and scores the parameters that it ends with.
"""

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ratios import add_ratio, ratios, turn_by_turn
from report import Report, machine
from sklearn.mixture import GaussianMixture as ScikitLearn
from threadpoolctl import threadpool_limits

import pyro_vae as pv
from pyro_vae.k_means import k_means
from pyro_vae.spaces import Real

ITERATIONS = 5  # updates in each call
ROUNDS = {10: 5, 100: 3}
MIN_SCALE = 1e-4
VARIANCE = 0.05  # of every pixel at the start


class Start:
    """K-means centres, equal weights, one variance."""

    def __init__(self, rows: torch.Tensor, num_components: int) -> None:
        self.num_components = num_components
        self.centers = k_means(rows, num_components, torch.Generator().manual_seed(0))

    def ours(self, space: Real) -> pv.models.GaussianMixture:
        mixture = pv.models.GaussianMixture(space, num_components=self.num_components, min_scale=MIN_SCALE)
        with torch.no_grad():
            mixture.loc.copy_(self.centers)
            mixture.log_scale.fill_(math.log(VARIANCE**0.5 - mixture.min_scale))
        return mixture

    def theirs(self, dtype: Any) -> ScikitLearn:
        shape = self.centers.shape
        return ScikitLearn(
            self.num_components,
            covariance_type="diag",
            tol=0,
            reg_covar=1e-12,
            max_iter=ITERATIONS,
            means_init=self.centers.numpy().astype(dtype),
            weights_init=np.full(shape[0], 1 / shape[0], dtype=dtype),
            precisions_init=np.full(shape, 1 / VARIANCE, dtype=dtype),
        )


def fit_theirs(start: Start, rows: np.ndarray) -> ScikitLearn:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so few passes have not converged
        return start.theirs(rows.dtype).fit(rows)


def fit_ours(start: Start, data: pv.Data, precision: str) -> pv.models.GaussianMixture:
    mixture = start.ours(data.space)
    settings = {"num_iterations": ITERATIONS + 1, "tolerance": 0.0, "warm_start": True}  # the last pass scores
    mixture.maximum_likelihood(data.train.obs, precision=precision, **settings)
    return mixture


def mean_log_prob(mixture: pv.models.GaussianMixture, obs: torch.Tensor) -> float:
    law = mixture.double().distribution()
    with torch.no_grad():
        return float(torch.cat([law.log_prob(block) for block in obs.double().split(4096)]).mean())


def compare(report: Report, data: pv.Data, num_components: int, bars: dict[str, str | None]) -> None:
    rows = data.train.obs.flatten(1).numpy()
    start, double = Start(data.train.obs.flatten(1), num_components), rows.astype(np.float64)
    fitted: dict[str, Any] = {}

    def keep(name: str, fit: Callable[[], Any]) -> Callable[[], None]:
        return lambda: fitted.__setitem__(name, fit())

    seconds = turn_by_turn(
        torch.device("cpu"),
        {
            "scikit-learn": keep("scikit-learn", lambda: fit_theirs(start, double)),
            "scikit-learn, float32": keep("scikit-learn, float32", lambda: fit_theirs(start, rows)),
            "mixed": keep("mixed", lambda: fit_ours(start, data, "mixed")),
            "double": keep("double", lambda: fit_ours(start, data, "double")),
        },
        ROUNDS[num_components],
    )
    title = f"Gaussian mixture (diag, K = {num_components}), MNIST"
    for name, numerator, denominator in (
        ("against scikit-learn in float64", "scikit-learn", "mixed"),
        ("against scikit-learn in float32", "scikit-learn, float32", "mixed"),
        ("all in float64, against scikit-learn in float64", "scikit-learn", "double"),
    ):
        per_round = ratios(seconds[numerator], seconds[denominator])
        more = {"seconds": {each: sorted(seconds[each])[len(per_round) // 2] for each in (numerator, denominator)}}
        row = f"{title}: times as fast, {name}"
        if name in bars:
            add_ratio(report, row, per_round, bar=bars[name], moonshot=bars.get("moonshot"), **more)
        else:
            report.add(row=row, ratio=sorted(per_round)[len(per_round) // 2], rounds=len(per_round), **more)
    for what, obs in (("training", data.train.obs), ("held-out", data.test.obs)):
        here = mean_log_prob(fitted["mixed"], obs)
        there = float(fitted["scikit-learn"].score(obs.flatten(1).double().numpy()))
        add_ratio(
            report,
            f"{title}: nats from scikit-learn in float64, {what} data",
            [abs(here - there)],
            bar="<= 0.01",
            log_prob={"here": here, "scikit-learn": there},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = pv.load_data("mnist", space="real", root=arguments.root, seed=0)
    with threadpool_limits(1):
        header = {"benchmark": "mixtures", "iterations": ITERATIONS, **machine(torch.device("cpu"))}
        report = Report(arguments.out / "bench_mixtures.json", header)
        compare(report, data, 10, {"against scikit-learn in float64": ">= 2.5", "moonshot": ">= 4"})
        compare(report, data, 100, {})


if __name__ == "__main__":
    main()
