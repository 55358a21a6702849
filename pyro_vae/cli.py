"""The command line: train, evaluate, compare, bounds, latents; the rest is in `cli_uses.py` and `cli_restored.py`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_vae import cli_restored, cli_uses, distributed, options

if TYPE_CHECKING:
    import numpy as np

    from pyro_vae.study import Job

SHARED = ("train", "evaluate")  # the commands that several processes share


class _Commands(click.Group):
    """Expected errors are one line on the terminal, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ArithmeticError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            saved = ctx.invoked_subcommand in ("train", "compare")
            click.echo(f"interrupted{'; what was saved can be resumed with --resume' * saved}", err=True)
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="pyro-vae")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Fit latent variable models and compare them by held-out log-likelihood, with errors and a direction."""
    if distributed.launched() > 1 and ctx.invoked_subcommand not in SHARED:
        those = " and ".join(SHARED)
        raise click.UsageError(
            f"{ctx.invoked_subcommand} runs in one process: start it without torchrun, which is for {those}"
        )


@main.command("train")
@click.option("--model", required=True, help="File name in models/: vae, cvae, gmm, ...")
@options.data_options
@click.option("--set", "model_options", multiple=True, metavar="NAME=VALUE", help="Model option, e.g. latent_dim=16.")
@options.guide
@click.option("--fit", "fit", multiple=True, metavar="NAME=VALUE", help="Fit setting, e.g. num_epochs=50.")
@options.out
@options.resume
@options.machine
def train_command(
    model: str,
    model_options: tuple[str, ...],
    guide: str | None,
    guide_options: tuple[str, ...],
    fit: tuple[str, ...],
    out: Path,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    **data: Any,
) -> None:
    """Fit one model into a run directory."""
    from pyro_vae import pictures, runs, svi

    with options.together(data):
        device = options.prepare(data)
        settings = {"options": model_options, "guide_options": guide_options, "fit": fit}
        parsed = {name: options.values(pairs) for name, pairs in settings.items()}
        config = options.config(data, model=model, guide=guide, **parsed)
        run, history = runs.train(config, out, device=device, resume=resume, overwrite=overwrite, progress=not quiet)
        best = f"best {history.best_epoch}"
        if history.best_valid_elbo is not None:
            best += f", validation {pictures.validated_quantity(run)} {history.best_valid_elbo:.3f} nats"
        click.echo(f"{model}: {history.status} after {len(history.rows)} epochs, {best}")
        if history.reason not in ("", svi.TOO_FEW) and parsed["fit"].get("compile") is not False:
            click.echo(f"{model}: no graph of the steps was taken: {history.reason}")
        if history.status == "interrupted":
            raise KeyboardInterrupt
        for path in pictures.plot_run(run) if distributed.is_first() else ():
            click.echo(f"wrote {path}")


@main.command("evaluate")
@options.run
@options.estimate_options
@options.num_data
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Directory to write to; RUN if not given.")
def evaluate_command(
    run: Path, data: str | None, root: str | None, num_data: int | None, out: Path | None, **how: Any
) -> None:
    """Held-out log p of the test data: per image as npz and CSV, the summary as JSON."""
    from pyro_vae import runs, study

    with options.together(how):
        opened = runs.open_run(run, data=data, root=root)
        batch = opened.data.test if num_data is None else opened.data.test.subset(num_data, how["seed"])
        choice = options.take_choice(how)
        result = cli_uses.estimated(opened, batch, choice, **how)
        folder = out or run
        if distributed.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            for path in study.save_evaluation(result, folder, choice=choice):
                click.echo(f"wrote {path}")


@main.command("compare")
@options.data_options
@click.option("--models", multiple=True, help="Comma-separated rows, or all; the defaults for the data if not given.")
@options.choice
@options.num_data
@click.option("--fits", type=click.IntRange(1), default=1, help="Fits of each row, from seeds that follow each other.")
@click.option(
    "--groups",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="An .npy file with a label for each of all test data: those of one label are not independent.",
)
@click.option("--fit", "fit", multiple=True, metavar="NAME=VALUE", help="Fit setting of the rows fitted by SVI.")
@click.option("--jobs", type=click.IntRange(1), default=None, help="Rows fitted side by side; on a CPU one per core.")
@options.out
@options.resume
@options.machine
def compare_command(
    models: tuple[str, ...],
    num_data: int | None,
    fits: int,
    groups: Path | None,
    fit: tuple[str, ...],
    jobs: int | None,
    out: Path,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    **data: Any,
) -> None:
    """Fit, score and compare models on one data set: one table, with paired differences."""
    from pyro_vae import recipes, study
    from pyro_vae.estimators.evaluate import pick_device

    threads, choice = data.pop("threads"), options.take_choice(data)
    device = str(pick_device(options.checked(data.pop("device"))))
    base = options.config(data, model="vae")
    loaded = base.load_data()
    wanted = [name.strip() for names in models for name in names.split(",")]
    entries = recipes.named_entries(loaded, wanted) if wanted else recipes.default_entries(loaded)
    clusters = None if groups is None else study.read_clusters(groups, loaded, num_data, base.seed)
    workers = min(jobs or (study.num_cores() if device == "cpu" else 1), len(entries) * fits)
    if threads is None and device == "cpu":
        threads = max(1, study.num_cores() // workers)
    work = [
        study.Job(
            entry.name,
            config,
            out / name,
            choice,
            num_data,
            device,
            threads,
            resume,
            overwrite,
            progress=not quiet and workers == 1,
        )
        for entry in entries
        for name, config in study.fits_of(entry, base, options.values(fit), fits)
    ]
    click.echo(f"{loaded.name}: {len(loaded.train)} train, {len(loaded.valid)} valid, {len(loaded.test)} test")
    click.echo(f"rows: {', '.join(entry.name for entry in entries)} ({workers} at a time on {device})")
    study.run_jobs(work, workers, click.echo)
    _report(work, loaded.name, out, clusters)


def _report(work: "list[Job]", data_name: str, out: Path, clusters: "np.ndarray | None") -> None:
    """Tables on the terminal and in a file, the JSON, the pictures."""
    from pyro_vae import arviz, pictures, plots, runs, study

    main_group, beside = study.gather(work, clusters)
    groups = [group for group in (main_group, *beside) if group is not None]
    text = "\n\n".join(group.report() for group in groups)
    click.echo(f"\n{text}\n")
    (out / "comparison.txt").write_text(text + "\n", encoding="utf-8")
    paths = [out / "comparison.txt", groups[0].to_json(out / "comparison.json", data_name=data_name, beside=groups[1:])]
    names = ["comparison", *(f"comparison_{group.rows[0].result.given}" for group in groups[1:])]
    for group, name in zip(groups, names, strict=True):
        paths += [arviz.save_netcdf(group, out / f"{name}.nc"), plots.plot_comparison(group, out / f"{name}.png")]
    for job in work:
        paths += pictures.plot_run(runs.open_run(job.out))
    click.echo("\n".join(f"wrote {path}" for path in paths))


@main.command("bounds")
@click.argument(
    "run_paths",
    metavar="RUN...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--curve", default="1,10,100,1000,5000", help="Particles at which the bound is drawn.")
@options.estimator("ais")
@options.settings
@options.num_data
@options.moved
@options.seed
@options.machine
@options.out
def bounds_command(
    run_paths: tuple[Path, ...],
    curve: str,
    data: str | None,
    root: str | None,
    num_data: int | None,
    seed: int,
    out: Path,
    quiet: bool,
    **how: Any,
) -> None:
    """Runs side by side from the ELBO up: a better p(x), or a tighter q? Best: 100 steps of annealing unless told."""
    from pyro_vae import plot_bounds, runs
    from pyro_vae.bounds import compare_bounds
    from pyro_vae.estimators.choice import TUNED, Choice

    choice, device = options.take_choice(how), options.prepare(how)
    opened = {path.name: runs.open_run(path, data=data, root=root) for path in run_paths}
    if len(opened) < len(run_paths):
        raise click.BadParameter("runs must have different folder names", param_hint="RUN...")
    first = next(iter(opened.values()))
    for name, run in opened.items():
        if run.data.test.digest != first.data.test.digest:
            raise ValueError(f"{name} was fitted for other test data than {next(iter(opened))}: their SHA-256 differ")
    batch = first.data.test if num_data is None else first.data.test.subset(num_data, seed)
    if choice.overdispersion == TUNED:
        raise click.BadParameter("a factor tuned for one run is not that of the others", param_hint="--overdispersion")
    best = None if choice == Choice("ais") else choice.build(first.model, first.data.valid, seed=seed, device=device)
    found = compare_bounds(
        {name: run.model if run.guide is None else (run.model, run.guide) for name, run in opened.items()},
        batch,
        num_particles=options.numbers(curve),
        best=best,
        seed=seed,
        device=device,
        progress=not quiet,
    )
    click.echo(found.table())
    out.mkdir(parents=True, exist_ok=True)
    paths = [found.to_json(out / "bounds.json"), plot_bounds.plot_bound_curves(found, out / "bounds.png")]
    click.echo("\n".join(f"wrote {path}" for path in paths))


@main.command("latents")
@options.run
@click.option("--particles", type=click.IntRange(2), default=64, help="Draws of each datum.")
@options.num_data
@options.moved
@options.seed
@click.option("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one.")
@options.out
def latents_command(
    run: Path,
    particles: int,
    num_data: int | None,
    data: str | None,
    root: str | None,
    seed: int,
    device: str | None,
    out: Path,
) -> None:
    """What a fitted model does with its latents: active units, the KL of each, the ELBO taken apart."""
    from pyro_vae import plot_latents, runs
    from pyro_vae.usage.latent_use import latent_use

    opened = runs.open_run(run, data=data, root=root)
    batch = opened.data.test if num_data is None else opened.data.test.subset(num_data, seed)
    device = options.checked(device)
    use = latent_use(opened.model, batch, guide=opened.guide, num_particles=particles, seed=seed, device=device)
    click.echo(use.table())
    out.mkdir(parents=True, exist_ok=True)
    paths = [use.to_json(out / "latents.json"), plot_latents.plot_latent_use(use, out / "latents.png")]
    click.echo("\n".join(f"wrote {path}" for path in paths))


for command in (*cli_uses.COMMANDS, *cli_restored.COMMANDS):
    main.add_command(command)


if __name__ == "__main__":
    main()
