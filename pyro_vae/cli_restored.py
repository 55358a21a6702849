"""Images that a fitted model completes or makes from codes, on the command line: restore, traverse."""

from pathlib import Path
from typing import Any

import click

from pyro_vae import options
from pyro_vae.uses import HOW, WAYS


@click.command("restore")
@options.run
@click.option("--missing", default=None, help="top_left, right, ...; an .npy mask (1 is missing); or a share, 0.5.")
@click.option("--noise", type=float, default=None, help="Instead: sd of normal noise (Real), P(flip) (Binary).")
@click.option(
    "--images",
    type=click.Path(exists=True, path_type=Path),
    default=None,
    help="Images of your own as they were seen; else test data of the run, which get the noise asked for.",
)
@options.num_data
@click.option("--how", type=click.Choice(HOW), default=None, help="Draws of the latents, if any (resampling).")
@click.option("--draws", type=click.IntRange(1), default=16, help="Of each image; for mcmc also the chains.")
@click.option("--particles", type=click.IntRange(2), default=None, help="That draws are resampled from (1000).")
@click.option("--no-score", is_flag=True, help="Leave out log p(missing | given).")
@options.moved
@options.seed
@click.option("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one.")
@options.quiet
@options.out
def restore_command(
    run: Path,
    missing: str | None,
    noise: float | None,
    images: Path | None,
    num_data: int | None,
    how: str | None,
    draws: int,
    particles: int | None,
    no_score: bool,
    data: str | None,
    root: str | None,
    seed: int,
    device: str | None,
    quiet: bool,
    out: Path,
) -> None:
    """Restore missing or noisy pixels by the posterior: draws, their mean, log p(missing | given), a picture."""
    from pyro_vae import plot_uses, restored_files, runs
    from pyro_vae.comparison import compare
    from pyro_vae.restoration.restore import restore

    if images is not None:
        options.refuse("it is for test data, and --images are all restored", num_data=num_data)
    if how == "mcmc":
        options.refuse("--how mcmc has chains, as many as --draws", particles=particles)
    opened = runs.open_run(run, data=data, root=root)
    truth, seen = restored_files.images_of(opened, images, num_data, noise, seed)
    found = restore(
        opened.model,
        seen,
        None if missing is None else restored_files.read_mask(missing, tuple(seen.obs.shape[1:]), seed),
        noise=noise,
        guide=opened.guide,
        how=how,
        num_draws=draws,
        num_particles=particles,
        score=False if no_score or images is not None else None,
        seed=seed,
        device=options.checked(device),
        progress=not quiet,
    )
    click.echo(f"{len(seen)} images: {found.how}")
    if found.log_prob is not None:
        click.echo(compare({opened.config.model: found.log_prob}).table())
    out.mkdir(parents=True, exist_ok=True)
    paths = restored_files.save(found, seen, truth, out)
    paths.append(plot_uses.plot_restoration(found, seen, truth, out / "restored.png"))
    click.echo("\n".join(f"wrote {path}" for path in paths))


@click.command("traverse")
@options.run
@click.option("--units", type=click.IntRange(1), default=None, help="Latents, the most used first (10).")
@click.option("--steps", type=click.IntRange(2), default=9, help="Images of each.")
@click.option("--around", type=click.IntRange(0), default=None, help="Test datum whose code is the base.")
@click.option(
    "--between",
    type=click.IntRange(0),
    nargs=2,
    default=None,
    help="Instead: two test data, and the way from one code to the other.",
)
@click.option("--way", type=click.Choice(WAYS), default=None, help="With --between (spherical).")
@options.num_data
@options.moved
@options.seed
@click.option("--device", default=None, help="cpu, cuda, cuda:1; a GPU if there is one.")
@options.out
def traverse_command(
    run: Path,
    units: int | None,
    steps: int,
    around: int | None,
    between: tuple[int, int] | None,
    way: str | None,
    num_data: int | None,
    data: str | None,
    root: str | None,
    seed: int,
    device: str | None,
    out: Path,
) -> None:
    """Images along one latent at a time, over the quantiles of its prior; or between two images."""
    import numpy as np

    from pyro_vae import plot_uses, runs, traversal

    if between:
        options.refuse("it is for traversals, not for the way --between two images", around=around, units=units)
    else:
        options.refuse("it goes with --between", way=way)
    opened = runs.open_run(run, data=data, root=root)
    batch = opened.data.test if num_data is None else opened.data.test.subset(num_data, seed)
    how: dict[str, Any] = {"guide": opened.guide, "num_steps": steps, "seed": seed, "device": options.checked(device)}
    out.mkdir(parents=True, exist_ok=True)
    context = opened.data.context
    if between:
        way = way or WAYS[0]
        images = traversal.interpolate(opened.model, batch, *between, way=way, **how)
        arrays: dict[str, Any] = {"images": images.numpy()}
        plot_uses.plot_way(images, batch, between, way, out / "interpolation.png", context)
        paths = [out / "interpolation.png", out / "interpolation.npz"]
    else:
        found = traversal.traverse(opened.model, batch, around=around, num_units=units or 10, **how)
        arrays = {"images": found.images.numpy(), "units": found.units, "used": found.used, "values": found.values}
        plot_uses.plot_traversal(found, batch, out / "traversal.png", context)
        for unit, used in zip(found.units, found.used, strict=True):
            click.echo(f"latent {unit}: {used:.3f} ({found.kind})")
        paths = [out / "traversal.png", out / "traversal.npz"]
    np.savez(paths[-1], **arrays)
    click.echo("\n".join(f"wrote {path}" for path in paths))


COMMANDS = (restore_command, traverse_command)
