"""The main job: every row of a comparison fitted and scored, in this process or side by side, and gathered."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.comparison import Comparison, compare, finite
from pyro_vae.configuration import Config, check_settings, is_conditional, model_class
from pyro_vae.data import Batch, Data
from pyro_vae.estimators.choice import Choice
from pyro_vae.estimators.evaluate import log_likelihood
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.fitting import own_method
from pyro_vae.recipes import Entry
from pyro_vae.runs import fit_record, open_run, train


def configure(entry: Entry, base: Config, fit: dict[str, Any]) -> Config:
    """The configuration of an entry: the base's data and seed, the entry's model, its settings changed by `fit`."""
    given = base.given or ("label" if is_conditional(entry.model) else None)
    settings = entry.fit if own_method(model_class(entry.model)) else {**entry.fit, **fit}
    check_settings(entry.model, settings)
    return dataclasses.replace(base, model=entry.model, options=entry.options, fit=settings, given=given)


def fits_of(entry: Entry, base: Config, fit: dict[str, Any], num: int) -> list[tuple[str, Config]]:
    """Directory names and configurations of several fits of one recipe, to the same data."""
    config = configure(entry, base, fit)
    again = [(f"{entry.name}_fit{i + 1}", dataclasses.replace(config, fit_seed=base.seed + i)) for i in range(1, num)]
    return [(entry.name, config), *again]


@dataclass(frozen=True)
class Job:
    """One fit and its evaluation, as a worker process gets it; several fits of one recipe share a row."""

    row: str
    config: Config
    out: Path
    choice: Choice
    num_data: int | None
    device: str | None
    threads: int | None
    resume: bool
    overwrite: bool
    progress: bool

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.out.name


def fit_and_score(job: Job) -> str:
    """Fit, evaluate on the test data once, save both; a finished run is left as it is when resuming."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.resume and _is_done(job):
        return job.name
    started = job.resume and (job.out / "checkpoint.pt").is_file()
    if not (started and _is_fitted(job)):
        anew = job.overwrite or job.resume  # resuming what had no checkpoint yet loses nothing
        _, history = train(
            job.config, job.out, device=job.device, resume=started, overwrite=anew, progress=job.progress
        )
        if history.status == "interrupted":
            raise KeyboardInterrupt
    run, seed = open_run(job.out), job.config.seed
    result = log_likelihood(
        run.model,
        run.data.test if job.num_data is None else run.data.test.subset(job.num_data, seed),
        guide=run.guide,
        estimator=job.choice.build(run.model, run.data.valid, guide=run.guide, seed=seed, device=job.device),
        seed=seed,
        device=job.device,
        progress=job.progress,
    )
    save_evaluation(result, job.out, choice=job.choice)
    return job.name


def read_clusters(path: Path, data: Data, num_data: int | None, seed: int) -> np.ndarray:
    """The cluster of each test datum, from an .npy file of one label per datum; a subset takes those of its own."""
    try:
        labels = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} must be an .npy file of plain numbers or texts: {error}") from error
    if not isinstance(labels, np.ndarray) or labels.shape != (len(data.test),):
        shape = getattr(labels, "shape", "several arrays")
        raise ValueError(f"{path} must hold one label per test datum, shape ({len(data.test)},), found {shape}")
    if num_data is None:
        return labels
    order = torch.arange(len(data.test), dtype=torch.float64)
    return labels[Batch(order).subset(num_data, seed).obs.long().numpy()]


def _is_fitted(job: Job) -> bool:
    same = (job.out / "config.json").is_file() and Config.load(job.out / "config.json") == job.config
    return same and (job.out / "fit.json").is_file() and fit_record(job.out)["status"] != "interrupted"


def _is_done(job: Job) -> bool:
    path = job.out / "evaluation.npz"
    if not (_is_fitted(job) and path.is_file()):
        return False
    result = LogLikelihood.load(path)
    whole = result.digest == fit_record(job.out)["test_sha256"]
    if (
        result.seed != job.config.seed
        or whole != (job.num_data is None)
        or len(result) != (job.num_data or len(result))
    ):
        return False  # `evaluate` left the figures of another seed or of a subset
    if not (job.out / "evaluation.json").is_file():
        return False
    summary = json.loads((job.out / "evaluation.json").read_text(encoding="utf-8"))
    return result.direction == "exact" or summary.get("choice") == job.choice.to_dict()


def save_evaluation(
    result: LogLikelihood, out: Path, name: str = "evaluation", choice: Choice | None = None
) -> list[Path]:
    """Per-image figures as npz and CSV, the summary and the choice as JSON; the marginal, if any, beside them."""
    paths = [out / f"{name}.npz", out / f"{name}.csv", out / f"{name}.json"]
    paths[2].unlink(missing_ok=True)  # a run killed here must not leave new figures under old settings
    result.save(paths[0])
    result.to_csv(paths[1])
    summary = result.summary() | ({} if choice is None else {"choice": choice.to_dict()})
    if result.marginal is not None:
        paths.append(out / f"{name}_marginal.csv")
        result.marginal.to_csv(paths[-1])
        summary["marginal"] = finite(result.marginal.summary())
    paths[2].write_text(json.dumps(finite(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return paths


def run_jobs(jobs: Sequence[Job], num_workers: int, say: Callable[[str], None]) -> None:
    """All jobs, in this process or side by side in workers; the first failure stops the rest."""
    if num_workers == 1:
        for job in jobs:
            say(f"{fit_and_score(job)} done")
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures = {pool.submit(fit_and_score, job): job.name for job in jobs}
        try:
            for future in as_completed(futures):
                say(f"{future.result()} done")
        except BaseException:
            for future in futures:
                future.cancel()
            with contextlib.suppress(OSError):
                _stop(pool)
            raise


def _stop(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gather(jobs: Sequence[Job], clusters: np.ndarray | None = None) -> tuple[Comparison | None, list[Comparison]]:
    """The comparison of log p(x), and those of log p(x | ·) that stand beside it; read from the run directories."""
    groups: dict[str, dict[str, list[LogLikelihood]]] = {}
    for job in jobs:
        result = LogLikelihood.load(job.out / "evaluation.npz")
        for each in (result, result.marginal):
            if each is not None:
                groups.setdefault(each.quantity, {}).setdefault(job.row, []).append(each)
    seconds = {job.row: fit_record(job.out)["seconds"] for job in reversed(jobs)}  # of the first of several fits
    comparisons = {
        name: compare(
            {row: results if len(results) > 1 else results[0] for row, results in group.items()},
            train_seconds=seconds,
            groups=clusters,
        )
        for name, group in groups.items()
    }
    main = comparisons.pop("log p(x)", None)
    return main, list(comparisons.values())
