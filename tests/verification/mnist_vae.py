"""Promise 4: the VAE of the README on MNIST, by importance sampling, multilevel and annealing, with a bracket."""

from collections.abc import Iterator
from pathlib import Path

import pyro_vae as pv
from pyro_vae import configuration, runs
from pyro_vae.comparison import SYMBOLS
from pyro_vae.recipes import FIT_LARGE, NET_LARGE
from verification import Row

ITEM = "4 MNIST VAE"
STEPS = 100  # of annealing from the guide


def open_or_fit(out: Path, root: str | None) -> runs.Run:
    """The run in `out`; fitted first, with the settings of `compare`, if it is not there (17 minutes on one core)."""
    if not (out / "fit.json").is_file():
        config = configuration.Config(model="vae", data="mnist", root=root, options=NET_LARGE, fit=FIT_LARGE)
        runs.train(config, out, resume=(out / "checkpoint.pt").is_file())
    return runs.open_run(out, root=root)


def rows(out: Path, root: str | None, num_data: int = 1000) -> Iterator[Row]:
    run = open_or_fit(out, root)
    batch = run.data.test.subset(num_data, seed=0)
    annealing = pv.annealed_importance_sampling(STEPS)
    estimators = {
        "IS-5000": pv.importance_sampling(5000),
        "IS-1000, refined proposal": pv.importance_sampling(1000, proposal=pv.refined()),
        "multilevel-500, the guide as proposal": pv.multilevel(500),
        "multilevel-500, refined proposal": pv.multilevel(500, proposal=pv.refined()),
        f"AIS T = {STEPS} from the guide, with BDMC": pv.sandwich(annealing, num_steps=STEPS, num_simulated=100),
    }
    found = {}
    for name, estimator in estimators.items():
        result = found[name] = pv.log_likelihood(run.model, batch, estimator=estimator, seed=0)
        interval = result.interval()
        seen = f"{SYMBOLS[result.direction]} {result.mean:.3f} (MC SE {result.mc_se:.3f}, test SE {result.test_se:.2f})"
        seen += f", interval [{interval.low:.3f}, {interval.high:.3f}]"
        seen += f"; warning: {interval.warning}" if interval.warning else ", no warning"
        yield Row(ITEM, name, f"{seen}; {result.seconds:.0f} s", "beside the others", None)
    *_, multilevel, annealed = found.values()
    left, right = multilevel.interval(), annealed.interval()
    meet = left.low <= right.high and right.low <= left.high
    narrow = max(left.high - left.low, right.high - right.low) < 0.3
    seen = f"difference {multilevel.mean - annealed.mean:+.3f} nats"
    asked = "no warning, narrower than 0.3, and their intervals meet"
    sure = left.warning is None and right.warning is None
    yield Row(ITEM, "multilevel (refined) and AIS", seen, asked, meet and narrow and sure)
    certificate = annealed.certificate
    seen = f"{certificate.gap:.3f} nats (SE {certificate.gap_se:.3f}); granted: {certificate.granted}"
    yield Row(ITEM, "BDMC gap, 100 simulated data", seen, "< 1", certificate.gap < 1)
