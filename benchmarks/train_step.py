"""One training step of a VAE (784-200-200-50, tanh) against torch written by hand and against plain Pyro.

python benchmarks/train_step.py --root data    # about 3 minutes, most of it inductor's

A step is loss, backward pass, Adam. By hand: one module, logits and binary cross-entropy, fused Adam, the same
estimator of the ELBO (the divergence by Monte Carlo, or in closed form). Plain Pyro: `SVI(model, guide, Adam,
Trace_ELBO())` with its defaults. Ours: the step that `pv.fit` takes, its check of the loss and its schedule included.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from ratios import add_ratio, ratios, turn_by_turn
from report import Report, machine
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv
from pyro_vae import svi, traces
from pyro_vae.data import Data

STEPS = {20: 60, 128: 25, 512: 8}  # of one timing, which is short: a machine that others use is never quiet for long
ROUNDS = 15
WAYS = {  # of `compile`: Pyro's handlers in every step; one graph, its operations one by one; fused by inductor
    "handlers": False,
    "graph": None,
    "inductor": True,
}
BARS = {  # of the ratio of ours to torch by hand on a CPU, by batch size
    "graph": {20: ("<= 1.35", "<= 1.27"), 128: ("<= 1.15", "<= 1.05"), 512: ("<= 1.15", "<= 1.05")},
    "inductor": {20: ("<= 1.05", None), 128: ("<= 1.0", "<= 0.9"), 512: ("<= 1.0", "<= 0.9")},
}
FASTER = {  # than plain Pyro
    "cpu": {20: (">= 2", ">= 2.9"), 128: (">= 1.5", ">= 2.0")},
    "cuda": {20: (">= 8", ">= 20"), 128: (">= 8", ">= 20")},
}


class ByHand(nn.Module):
    """The same VAE in plain torch: minus the ELBO of a batch, nats per datum."""

    def __init__(self, closed_form: bool) -> None:
        super().__init__()
        self.closed_form = closed_form
        tanh = nn.Tanh()
        self.encoder = nn.Sequential(nn.Linear(784, 200), tanh, nn.Linear(200, 200), tanh, nn.Linear(200, 100))
        self.decoder = nn.Sequential(nn.Linear(50, 200), tanh, nn.Linear(200, 200), tanh, nn.Linear(200, 784))

    def forward(self, obs: Tensor) -> Tensor:
        loc, log_scale = self.encoder(obs).chunk(2, -1)
        noise, scale = torch.randn_like(loc), log_scale.exp()
        z = loc + scale * noise
        reconstruction = binary_cross_entropy_with_logits(self.decoder(z), obs, reduction="sum")
        if self.closed_form:
            divergence = (0.5 * (loc**2 + scale**2 - 1) - log_scale).sum()
        else:
            divergence = (0.5 * (z**2 - noise**2) - log_scale).sum()
        return (reconstruction + divergence) / len(obs)


def by_hand(obs: Tensor, closed_form: bool) -> Callable[[], None]:
    """A step of it."""
    model, flat = ByHand(closed_form).to(obs.device), obs.flatten(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss = model(flat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_pyro(obs: Tensor, space: pv.Binary) -> Callable[[], object]:
    """A step of SVI as it comes."""
    model = pv.models.VAE(space).to(obs.device)
    stepper = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())

    def step() -> object:
        with pyro.validation_enabled(True):  # Pyro's default
            return stepper.step(obs)

    return step


def ours(obs: Tensor, data: Data, compile: bool | None, objective: str = "elbo") -> Callable[[], object]:
    """A step of `pv.fit`, once what is traced or compiled has been."""
    model = pv.models.VAE(data.space)
    settings = svi.Settings(num_epochs=10**6, batch_size=len(obs), objective=objective, compile=compile)
    run = svi.Run(traces.as_pair(model), data, settings, obs.device, None)
    run._start(None)
    run.gradients.on_trial = False

    def step() -> object:
        with pyro.validation_enabled(False):
            return run._train_step((obs,))

    step()
    wanted = {False: "eager", None: "graph", True: "inductor"}[compile]
    if run.gradients.way != ("cuda graph" if obs.is_cuda and compile is not False else wanted):
        raise RuntimeError(f"expected to run as {wanted}, not as {run.gradients.way}: {run.gradients.reason}")
    return step


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def rows(report: Report, data: Data, size: int, device: torch.device, ways: Mapping[str, bool | None] = WAYS) -> None:
    """All ratios at one batch size."""
    obs = data.train.obs[:size].to(device)
    steps = {"by hand": by_hand(obs, False), "by hand, closed form": by_hand(obs, True)}
    steps["plain Pyro"] = plain_pyro(obs, data.space)
    steps |= {way: ours(obs, data, compile) for way, compile in ways.items()}
    steps |= {f"{way}, closed form": ours(obs, data, compile, "mean_field") for way, compile in ways.items()}
    seconds = turn_by_turn(device, {name: repeated(step, STEPS[size]) for name, step in steps.items()}, ROUNDS)
    for kind in ("", ", closed form"):
        for way in ways:
            bar, moonshot = BARS.get(way, {}).get(size, (None, None)) if device.type == "cpu" else (None, None)
            name = f"train step, batch {size}{kind}: {way} to torch by hand"
            more = {"milliseconds": 1e3 * min(seconds[f"{way}{kind}"]) / STEPS[size]}
            found = ratios(seconds[f"{way}{kind}"], seconds[f"by hand{kind}"])
            add_ratio(report, name, found, bar=bar, moonshot=moonshot, **more)
    for way in ways:
        bar, moonshot = FASTER[device.type].get(size, (None, None)) if way == "graph" else (None, None)
        name = f"train step, batch {size}: plain Pyro to {way}"
        add_ratio(report, name, ratios(seconds["plain Pyro"], seconds[way]), bar=bar, moonshot=moonshot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sizes", default="20,128,512", help="batch sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    report = Report(arguments.out / "bench_train_step.json", {"benchmark": "train_step", **machine(device)})
    data = pv.load_data("mnist", root=arguments.root, seed=0)
    for size in map(int, arguments.sizes.split(",")):
        rows(report, data, size, device)


if __name__ == "__main__":
    main()
