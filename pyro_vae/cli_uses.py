"""What a fitted model says of images, on the command line: features, sample, score."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_vae import options
from pyro_vae.uses import SCORES, SIDES

if TYPE_CHECKING:
    import numpy as np

    from pyro_vae.data import Batch
    from pyro_vae.estimators.choice import Choice
    from pyro_vae.estimators.result import LogLikelihood
    from pyro_vae.runs import Run
    from pyro_vae.scores import Scorer
    from pyro_vae.scoring import Outlier


@click.command("features")
@options.run
@click.option("--sites", default=None, help="Comma-separated latent sites; all of the model's if not given.")
@click.option("--draws", type=click.IntRange(1), default=256, help="Of the guide, where its mean is not known.")
@options.moved
@options.seed
@click.option("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .npz file to write.")
def features_command(
    run: Path,
    sites: str | None,
    draws: int,
    data: str | None,
    root: str | None,
    seed: int,
    device: str | None,
    out: Path,
) -> None:
    """Codes of the training, validation and test data, with their labels, as npz."""
    import numpy as np

    from pyro_vae import codes, runs

    if out.suffix != ".npz":
        raise click.BadParameter(f"expected a file that ends in .npz, got {out}", param_hint="--out")
    opened = runs.open_run(run, data=data, root=root)
    chosen = sites and [name.strip() for name in sites.split(",")]
    how: dict[str, Any] = {"sites": chosen, "num_draws": draws, "seed": seed, "device": options.checked(device)}
    arrays: dict[str, Any] = {}
    for name in ("train", "valid", "test"):
        batch: Batch = getattr(opened.data, name)
        arrays[name] = codes.features(opened.model, batch, guide=opened.guide, **how).numpy()
        if batch.labels is not None:
            arrays[f"{name}_labels"] = batch.labels.numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **arrays)
    click.echo(f"codes of {arrays['test'].shape[1]} numbers\nwrote {out}")


@click.command("sample")
@options.run
@click.option("--num", type=click.IntRange(1), default=8, help="Draws; given labels or quadrants, of each row.")
@click.option(
    "--label", "labels", type=int, multiple=True, help="This class only, for a model given labels; may be repeated."
)
@options.moved
@click.option("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="PNG to write; RUN/samples.png if not given."
)
@click.option("--seed", type=int, default=0, help="Of the draws.")
def sample_command(
    run: Path,
    num: int,
    labels: tuple[int, ...],
    data: str | None,
    root: str | None,
    device: str | None,
    out: Path | None,
    seed: int,
) -> None:
    """Draw from a fitted model: a grid of images, and the numbers beside it as npz."""
    import numpy as np

    from pyro_vae import pictures, runs

    opened = runs.open_run(run, data=data, root=root)
    path = out or run / "samples.png"
    if path.suffix != ".png":
        raise click.BadParameter(f"expected a file that ends in .png, got {path}", param_hint="--out")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw_samples(opened, num=num, seed=seed, labels=labels or None, device=options.checked(device))
    pictures.plot_samples(opened, drawn, path, num=num, seed=seed)
    arrays: dict[str, Any] = {name: values.numpy() for name, values in drawn.items()}
    np.savez(path.with_suffix(".npz"), **arrays)
    click.echo(f"wrote {path}\nwrote {path.with_suffix('.npz')}")


@click.command("score")
@options.run
@click.argument("images", type=click.Path(exists=True, path_type=Path))
@click.option("--score", "name", type=click.Choice(SCORES), default="log_prob", help="What ranks the images.")
@click.option(
    "--background",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="For --score ratio: the run of a background model.",
)
@click.option(
    "--calibrate",
    type=click.Choice(["test", "valid", "none"]),
    default="test",
    help="Data of the run that p-values compare with; the fit must not have seen them, and valid chose its epoch.",
)
@click.option("--calibration", type=click.IntRange(1), default=None, help="How many of these, at most (1000).")
@click.option("--sides", type=click.Choice(SIDES), default=None, help="Whether low scores are extreme too (one).")
@click.option("--level", type=click.FloatRange(0, 1, True, True), default=None, help="Share of false flags (0.1).")
@options.estimate_options
@click.option("--binarize", is_flag=True, help="Draw bits from grey levels, for a model of bits.")
@options.out
@click.option("--top", type=click.IntRange(1), default=10, help="Outliers to print.")
def score_command(
    run: Path,
    images: Path,
    name: str,
    background: Path | None,
    calibrate: str,
    calibration: int | None,
    sides: str | None,
    level: float | None,
    data: str | None,
    root: str | None,
    binarize: bool,
    out: Path,
    top: int,
    **how: Any,
) -> None:
    """Score images of your own (.npy, .npz with one array, or a folder), with p-values, outliers first."""
    from pyro_vae import runs, scores, scoring, study
    from pyro_vae.conformal import conformal_p_values

    if (background is not None) != (name == "ratio"):
        raise click.UsageError("--background goes with --score ratio, and --score ratio needs it")
    if calibrate == "none":
        options.refuse(
            "it is of p-values, and --calibrate none has none", calibration=calibration, sides=sides, level=level
        )
    if name == "typicality" and calibrate == "valid":
        raise click.UsageError("--score typicality measures from validation data, which cannot calibrate it as well")
    level = level or 0.1
    opened, seed = runs.open_run(run, data=data, root=root), how["seed"]
    batch = scoring.read_batch(images, opened, binarize=binarize, seed=seed)
    choice = options.take_choice(how)
    device = options.checked(how["device"])
    result = estimated(opened, batch, choice, **how)
    scorer = scores.Scorer(
        opened.model,
        guide=opened.guide,
        estimator=choice.build(opened.model, opened.data.valid, guide=opened.guide, seed=seed, device=device),
        background=None if background is None else runs.open_run(background, data=data, root=root).model,
        reference=opened.data.valid,
        seed=seed,
        device=device,
        progress=not how["quiet"],
    )
    found, p_values = scorer(batch, [name], result)[name], None
    if calibrate != "none":
        inliers = scoring.calibration_data(opened, calibrate, calibration or 1000, seed)
        theirs = _calibration_scores(scorer, name, inliers, result)
        p_values = conformal_p_values(theirs, found, sides=sides or "one", seed=seed)
        _say_calibration(batch, inliers, calibrate)
    ranked = scoring.rank(result, found, p_values, level)
    _say_ranking(ranked, name, top, level)
    out.mkdir(parents=True, exist_ok=True)
    scoring.write_ranking(ranked, out / "outliers.csv")
    for path in [*study.save_evaluation(result, out, "scores", choice), out / "outliers.csv"]:
        click.echo(f"wrote {path}")


def _calibration_scores(scorer: "Scorer", name: str, inliers: "Batch", result: "LogLikelihood") -> "np.ndarray":
    """One score of the inliers, whose log p is had in the way in which `result` was."""
    from pyro_vae import scores, scoring

    compared = scorer.log_prob(inliers) if name in scores.BY_LOG_PROB else None
    if compared is not None:
        scoring.check_same_way(result, compared)
    return scorer(inliers, [name], compared)[name]


def _say_ranking(ranked: "list[Outlier]", name: str, top: int, level: float) -> None:
    """The first of the outliers, and how many are flagged."""
    for place, row in enumerate(ranked[:top], start=1):
        p_value = "" if row.p_value is None else f", p {row.p_value:.4f}{', flagged' * bool(row.flagged)}"
        other = "" if name == "log_prob" else f", {name} {row.score:.2f}"
        figures = f"log p {row.log_prob:.2f} nats, {row.deviation:+.1f} robust sd from the median of these images"
        click.echo(f"{place:4d}. image {row.index}: {figures}{other}{p_value}")
    if ranked and ranked[0].p_value is not None:
        flagged = sum(bool(row.flagged) for row in ranked)
        click.echo(f"{flagged} of {len(ranked)} flagged, of which {level:.0%} at most are inliers, on average")


def _say_calibration(batch: "Batch", inliers: "Batch", which: str) -> None:
    """What the p-values rest on, and what speaks against them."""
    from pyro_vae import scoring

    click.echo(f"p-values by {len(inliers)} {which} data of the run: the least is {1 / (len(inliers) + 1):.2g}")
    if which == "valid":
        click.echo("Note: validation data choose the epoch of a fit by gradients; p-values by them may be too small")
    shared = scoring.num_shared(batch, inliers)
    if shared:
        click.echo(f"Note: {shared} of the images are calibration data themselves, and their p-values no test")


def estimated(
    opened: "Run", batch: "Batch", choice: "Choice", *, seed: int, quiet: bool, **machine: Any
) -> "LogLikelihood":
    """The held-out log p of a batch, printed as a table."""
    from pyro_vae.estimators.evaluate import log_likelihood

    device = options.prepare(machine)
    how = choice.build(opened.model, opened.data.valid, guide=opened.guide, seed=seed, device=device)
    result = log_likelihood(
        opened.model, batch, guide=opened.guide, estimator=how, seed=seed, device=device, progress=not quiet
    )
    _print_result(opened.config.model, result)
    return result


def _print_result(name: str, result: "LogLikelihood") -> None:
    from pyro_vae.comparison import compare

    for each in (result, result.marginal):
        if each is not None:
            click.echo(compare({name: each}).table() + "\n")


COMMANDS = (features_command, sample_command, score_command)
