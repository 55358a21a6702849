"""Importance sampling with 5,000 particles on one CPU thread, against pythae, Pyro and the peak of a matrix product.

python benchmarks/importance.py --root data     # needs what benchmarks/requirements.txt names; `make bench` installs it

All score the same images by the same VAE, 784-200-200-50 with tanh, after a short fit:
- ours: `pv.log_likelihood` with `importance_sampling(5000)`, the whole call, on 32 images;
- pythae: its `get_nll` as it is shipped (100 particles at a time, one image after the other; it does not switch off
  gradients), on 8 of them, and in a row without a bar under `torch.no_grad`;
- Pyro: `vectorized_importance_weights`, one image at a time, of a pair written in plain Pyro, with Pyro's defaults and,
  in a row without a bar, without its validation.
The peak is what `torch.mm` reaches in the same rounds: with the shapes of the decoder's own three products, and in a
row without a bar with the fastest single shape.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from ratios import add_ratio, ratios, turn_by_turn
from report import Report, machine
from torch import Tensor, nn

import pyro_vae as pv

sys.path.append(str(Path(__file__).parent / ".peers"))  # behind the library's own packages

CPU = torch.device("cpu")
NUM_PARTICLES, NUM_IMAGES, PEER_IMAGES = 5000, 32, 8  # the peers take one image after the other
FLOP = 2 * (50 * 200 + 200 * 200 + 200 * 784)  # of the decoder, for one particle of one image
LAYERS = ((2048, 50, 200), (2048, 200, 200), (2048, 200, 784))  # (m, k, n): the decoder's, at the rows of a block
SHAPES = ((512, 200, 784), (768, 768, 768))  # others, one of which may be faster
PEAK_FLOP = 6e9  # of one timing
ACCURACY = {"num_data": 1000, "num_particles": 100}


def plain_pair(vae: pv.models.VAE) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """The same VAE as anyone would write it in Pyro, with the weights of ours."""
    encoder, decoder = plain(vae.encoder.layers, vae.posterior.linear), plain(vae.decoder.layers)

    def model(obs: Tensor) -> None:
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(50), torch.ones(50)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=obs)

    def guide(obs: Tensor) -> None:
        with pyro.plate("data", len(obs), dim=-1):
            loc, log_scale = encoder(obs).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def plain(*parts: nn.Module) -> nn.Sequential:
    """Linear layers with torch's own tanh between them."""
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
    return nn.Sequential(*[each for layer in layers for each in (layer, nn.Tanh())][:-1])


def of_pythae(vae: pv.models.VAE) -> Any:
    """Pythae's VAE with networks of ours."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain(vae.encoder.layers, vae.posterior.linear)

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_scale = self.layers(x.flatten(1)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = plain(vae.decoder.layers)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).sigmoid().reshape(-1, 1, 28, 28))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=50, reconstruction_loss="bce")
    return VAE(config, Encoder(), Decoder()).eval()


def by_pyro(model: Callable[[Tensor], None], guide: Callable[[Tensor], None], obs: Tensor) -> Tensor:
    """Log p of each image."""
    from pyro.infer.importance import vectorized_importance_weights

    found = []
    for image in obs.flatten(1).split(1):
        weights, *_ = vectorized_importance_weights(
            model, guide, image, num_samples=NUM_PARTICLES, max_plate_nesting=1, normalized=False
        )
        found.append(weights.logsumexp(0) - torch.tensor(float(NUM_PARTICLES)).log())
    return torch.stack(found)


def product(m: int, k: int, n: int) -> Callable[[], None]:
    """A matrix product, as often as `PEAK_FLOP` takes."""
    left, right, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)

    def work() -> None:
        for _ in range(round(PEAK_FLOP / flop((m, k, n)))):
            torch.mm(left, right.T, out=out)

    return work


def speed(report: Report, vae: pv.models.VAE, batch: pv.Batch, rounds: int) -> None:
    estimator, peer, pair = pv.importance_sampling(NUM_PARTICLES), of_pythae(vae), plain_pair(vae)
    obs = batch.obs[:PEER_IMAGES]

    def pythae(gradients: bool) -> float:
        with torch.set_grad_enabled(gradients):
            return float(peer.get_nll(obs[:, None], n_samples=NUM_PARTICLES))

    def pyro_with(validation: bool) -> Tensor:
        with torch.no_grad(), pyro.validation_enabled(validation):
            return by_pyro(*pair, obs)

    tasks: dict[str, Callable[[], Any]] = {
        "ours": lambda: pv.log_likelihood(vae, batch, estimator=estimator, device=CPU),
        "pythae": lambda: pythae(True),
        "pythae, no gradients": lambda: pythae(False),
        "pyro": lambda: pyro_with(True),
        "pyro, no validation": lambda: pyro_with(False),
        **{str(shape): product(*shape) for shape in (*LAYERS, *SHAPES)},
    }
    ours = tasks["ours"]().log_prob[:PEER_IMAGES].mean()
    means = {"ours": float(ours), "pythae": tasks["pythae"](), "pyro": float(tasks["pyro"]().mean())}
    report.add(row=f"mean log p of {PEER_IMAGES} images by all three", **means)
    seconds = turn_by_turn(CPU, tasks, rounds)
    images = {name: len(batch) if name == "ours" else PEER_IMAGES for name in tasks}
    each = {name: [time / images[name] for time in times] for name, times in seconds.items()}
    start, vectorised = "importance sampling, K = 5000: image-samples/s to", "Pyro's vectorized_importance_weights"
    bars = {
        "pythae": (f"{start} pythae's get_nll, as shipped", ">= 4.5", ">= 7"),
        "pythae, no gradients": (f"{start} pythae's get_nll, without gradients", None, None),
        "pyro": (f"{start} {vectorised}, one image at a time", ">= 2.2", ">= 3"),
        "pyro, no validation": (f"{start} {vectorised}, validation off", None, None),
    }
    for name, (row, bar, moonshot) in bars.items():
        rates = {key: NUM_PARTICLES / statistics.median(each[key]) for key in ("ours", name)}
        add(report, row, ratios(each[name], each["ours"]), bar, moonshot, image_samples_per_second=rates)
    shares(report, seconds, NUM_PARTICLES * len(batch))


def add(report: Report, row: str, per_round: list[float], bar: str | None, moonshot: str | None, **more: Any) -> None:
    """A row with a bar, or one that is only told."""
    if bar is not None:
        add_ratio(report, row, per_round, bar=bar, moonshot=moonshot, **more)
    else:
        report.add(row=row, ratio=statistics.median(per_round), range=[min(per_round), max(per_round)], **more)


def shares(report: Report, seconds: dict[str, list[float]], samples: int) -> None:
    """What the decoder's arithmetic takes at the peak, over what the whole call takes."""
    done = {shape: round(PEAK_FLOP / flop(shape)) * flop(shape) for shape in (*LAYERS, *SHAPES)}
    gflops = {str(shape): done[shape] / statistics.median(seconds[str(shape)]) / 1e9 for shape in done}
    own = [
        sum(flop(shape) / shape[0] / done[shape] * time for shape, time in zip(LAYERS, times, strict=True)) * samples
        for times in zip(*(seconds[str(shape)] for shape in LAYERS), strict=True)
    ]
    fastest = max(done, key=lambda shape: gflops[str(shape)])
    best = [samples * FLOP * time / done[fastest] for time in seconds[str(fastest)]]
    row = f"share of one thread's sgemm peak, decoder {FLOP:,} FLOP,"
    add(report, f"{row} same shapes", ratios(own, seconds["ours"]), ">= 0.65", ">= 0.77", gflops=gflops)
    add(report, f"{row} fastest shape {fastest}", ratios(best, seconds["ours"]), None, None)


def flop(shape: tuple[int, int, int]) -> int:
    """Of one product."""
    return 2 * shape[0] * shape[1] * shape[2]


def accuracy(report: Report, vae: pv.models.VAE, test: pv.Batch, num_data: int, num_particles: int) -> None:
    """Mean over images of log p in each precision less that in float64, with the same noise, in absolute value."""
    batch, values = test.subset(num_data, seed=2), {}
    for precision in ("float64", "float32", "tf32", "float16"):
        estimator = pv.importance_sampling(num_particles, precision=precision)
        values[precision] = pv.log_likelihood(vae, batch, estimator=estimator, device=CPU)
        if precision != "float64":
            gap = values[precision].log_prob - values["float64"].log_prob
            row = f"{precision} against float64, mean over {num_data:,} images, nats"
            more = {"mean": float(gap.mean()), "rms": float((gap**2).mean() ** 0.5), "largest": float(abs(gap).max())}
            recorded = values[precision].summary().get("precision_error")
            add_ratio(report, row, [abs(float(gap.mean()))], bar="< 0.001", recorded=recorded, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where torchvision's MNIST lies or goes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header = {"benchmark": "importance", "num_particles": NUM_PARTICLES, "num_images": NUM_IMAGES, **machine(CPU)}
    report = Report(arguments.out / "bench_importance.json", header)
    data = pv.load_data("mnist", root=arguments.root, seed=0)
    torch.manual_seed(0)
    vae = pv.models.VAE(data.space, latent_dim=50, hidden_dims=(200, 200))
    pv.fit(vae, data, num_epochs=2, device=CPU, seed=0)
    speed(report, vae, data.test.subset(NUM_IMAGES, seed=1), arguments.rounds)
    accuracy(report, vae, data.test, **ACCURACY)


if __name__ == "__main__":
    main()
