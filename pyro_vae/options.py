"""What the commands take: the options that several share, and what their words and numbers become."""

import ast
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_vae import distributed
from pyro_vae.estimators.names import ESTIMATORS, PRECISIONS, PROPOSALS

if TYPE_CHECKING:
    from pyro_vae.configuration import Config
    from pyro_vae.estimators.choice import Choice


Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def stacked(*options: Callable[..., Any]) -> Decorator:
    """Several options as one decorator, in the order in which --help shows them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


seed = click.option("--seed", type=int, default=0, help="Of everything random.")
quiet = click.option("--quiet", is_flag=True, help="No progress bar.")
machine = stacked(
    click.option("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one."),
    click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads; torch's choice if not given."),
    quiet,
)
data_options = stacked(
    click.option("--data", default="digits", help="Name (digits, mnist, ...), .npz or .npy file, or a folder."),
    click.option("--root", default=None, help="Where torchvision's files lie or go; 'data' if not given."),
    click.option("--space", type=click.Choice(["binary", "quantized", "real"]), help="Instead of the default."),
    click.option("--binarization", type=click.Choice(["dynamic", "static"]), default="dynamic"),
    click.option("--given", type=click.Choice(["label", "quadrants"]), help="What the model conditions on."),
    click.option("--quadrants", type=click.IntRange(1, 3), default=None, help="How many are given; 1 if not said."),
    seed,
)
guide = stacked(
    click.option("--guide", default=None, help="Posterior: a family in guides/, or FILE.py:NAME of your own."),
    click.option("--guide-set", "guide_options", multiple=True, metavar="NAME=VALUE", help="Option of the guide."),
)
run = click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
moved = stacked(
    click.option("--data", default=None, help="Where the run's data lie now, if they were a path that has moved."),
    click.option("--root", default=None, help="Where torchvision's files lie now, if they have moved."),
)
out = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write to.")
resume = stacked(
    click.option("--resume", is_flag=True, help="Go on with the run that is there; what has ended is left as it is."),
    click.option("--overwrite", is_flag=True, help="Replace the run that is there."),
)


def estimator(default: str) -> Decorator:
    """The option --estimator with another default."""
    return click.option(
        "--estimator",
        type=click.Choice(ESTIMATORS),
        default=default,
        help="Of log p; a model without latent sites is scored exactly whatever this says.",
    )


settings = stacked(
    click.option(
        "--particles",
        type=click.IntRange(1),
        default=None,
        show_default=False,
        help="K per datum; 5000 for is, 500 for multilevel, 1000 for router if not given.",
    ),
    click.option(
        "--proposal",
        type=click.Choice(PROPOSALS),
        default="guide",
        help="In place of the guide: for is, multilevel and annealing.",
    ),
    click.option("--overdispersion", default=None, help="Factor on the guide's variance (1.5), or 'tuned'."),
    click.option(
        "--steps",
        type=click.IntRange(1),
        default=None,
        show_default=False,
        help="Of annealing; 1000 for ais, smc and --certify, 30 for router if not given.",
    ),
    click.option("--chains", type=click.IntRange(1), default=None, help="Of annealing, per datum; 16 if not given."),
    click.option("--leapfrog", type=click.IntRange(1), default=None, help="Steps of each move of annealing (10)."),
    click.option("--start", type=click.Choice(["guide", "prior"]), default=None, help="Of annealing (guide)."),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default=None,
        show_default=False,
        help="Of the model's linear layers, for is and multilevel; float32 if not given.",
    ),
    click.option("--certify", is_flag=True, help="Check the estimator from both sides on simulated data."),
    click.option("--simulated", type=click.IntRange(2), default=None, help="How many, with --certify (100)."),
)
choice = stacked(estimator("is"), settings)
num_data = click.option(
    "--num-data", type=click.IntRange(1), default=None, help="A seeded random subset of the test data."
)
CHOICE = ("estimator", "particles", "proposal", "overdispersion", "precision", "certify", "simulated")
ANNEALING = ("steps", "chains", "leapfrog", "start")
estimate_options = stacked(choice, moved, seed, machine)


def take_choice(options: dict[str, Any]) -> "Choice":
    """The estimator's settings, taken out of the options."""
    from pyro_vae.estimators.choice import TUNED, Choice

    settings = {name: options.pop(name) for name in (*CHOICE, *ANNEALING)}
    factor = settings["overdispersion"]
    if factor not in (None, TUNED):
        try:
            settings["overdispersion"] = float(factor)
        except ValueError as error:
            raise click.BadParameter(
                f"expected a number or {TUNED!r}, got {factor!r}", param_hint="--overdispersion"
            ) from error
    return Choice(**settings)


def prepare(options: dict[str, Any]) -> str | None:
    """Set the number of threads and take the device out of the options."""
    import torch

    threads = options.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    return checked(options.pop("device"))


@contextlib.contextmanager
def together(options: dict[str, Any]) -> Iterator[None]:
    """Share the command with the processes that torchrun started: each on a device of its own, the first one prints."""
    with distributed.processes(options["device"]) as options["device"], contextlib.ExitStack() as stack:
        if not distributed.is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def checked(device: str | None) -> str | None:
    """The device, if there is one of this name."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"no device {device!r}: {reason}", param_hint="--device") from error
    return device


def config(data: dict[str, Any], **rest: Any) -> "Config":
    """The configuration of a run, from the options of its data and the rest."""
    from pyro_vae.configuration import Config

    quadrants = data.pop("quadrants")
    if quadrants is not None and data["given"] != "quadrants":
        raise click.UsageError("--quadrants needs --given quadrants")
    return Config(**data, quadrants=quadrants or 1, **rest)


def values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE as Python values where they are literals (16, 200,200, None), as text elsewhere."""
    found = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise click.BadParameter(f"expected NAME=VALUE, got {pair!r}")
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            value = text
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def numbers(text: str) -> tuple[int, ...]:
    """The particles of a curve, "1,10,100"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected whole numbers with commas, got {text!r}", param_hint="--curve") from error


def refuse(why: str, **options: object) -> None:
    """A usage error for the first of some options that was given and would be ignored."""
    for name, value in options.items():
        if value is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} would be ignored: {why}")
