"""Results for ArviZ: its ELPD objects, and one netCDF file for all models; the differences of 0.23 and 1.x end here."""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.comparison import Comparison, compare
from pyro_vae.estimators.estimate import ARRAYS
from pyro_vae.estimators.result import LogLikelihood, from_arrays, to_arrays
from pyro_vae.rows import Row

GROUP = "held_out"  # no group of ArviZ's scheme: held-out log p(x) is no `log_likelihood` given posterior draws

Results = Comparison | Mapping[str, LogLikelihood | Sequence[LogLikelihood]]


def to_arviz(results: Results) -> dict[str, Any]:
    """ArviZ's `ELPDData` of each model, for `arviz.compare`, `arviz.plot_compare` and `arviz.plot_khat`.

    `elpd` is Σ_n log p(x_n) in nats, without a penalty (`p` is 0), since the data are held out. In `arviz.compare`,
    `elpd_diff` is the sum of the paired differences and `dse` is √(n var d): n times the difference and n √((n-1)/n)
    times the standard error of `compare`, as long as there are no clusters and single fits. ArviZ knows of no direction
    and of no bias: `warning` is set where our own interval has one. An energy model's error of log Z, which all data
    share, is in `se`, times n; ArviZ's `dse` lacks it, and `warning` is set for that too.

    Ask for `arviz.compare(..., method="pseudo-BMA")` or `"BB-pseudo-BMA"`. The default, stacking, takes
    exp(log p(x_n)), which is 0 for log p of hundreds of nats, and then gives all models one weight. Never call
    `arviz.loo` on these values: it is for posterior draws. With ArviZ 1.x `round_to="none"` keeps all digits.

    Args:
        results: a comparison, or what `compare` takes.

    Returns:
        Model name to `ELPDData`, best first. An exact result has no weights and so no `pareto_k`, and `plot_khat`
        refuses it; of several fits log p is the mean and `pareto_k` the largest.

    Source: Vehtari, Gelman, Gabry, "Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC",
    2017, arXiv:1507.04544, for `se` and `dse`; Yao, Vehtari, Simpson, Gelman, "Using stacking to average Bayesian
    predictive distributions", 2018, arXiv:1704.02030, for the weights.
    """
    comparison = results if isinstance(results, Comparison) else compare(results)
    return {row.model: _elpd(row) for row in comparison.rows}


def _elpd(row: Row) -> Any:
    from xarray import DataArray

    arviz = _arviz()

    log_prob, num_data = row.log_prob, len(row.log_prob)
    khats = [fit.khat for fit in row.fits if fit.khat is not None]
    figures = {
        "elpd": float(log_prob.sum()),
        "se": math.hypot(float(np.sqrt(num_data * log_prob.var())), num_data * row.error.shared),
        "p": 0.0,
        "n_samples": row.result.num_particles,
        "n_data_points": num_data,
        "warning": row.warning is not None or row.error.shared > 0,
        "elpd_i": DataArray(log_prob, dims="datum"),
        "pareto_k": DataArray(np.max(khats, axis=0), dims="datum") if khats else None,
        "scale": "log",
        "good_k": row.result.khat_limit,
    }
    if not _is_old(arviz):
        new = getattr(arviz, "ELPDDataLOO", None) or partial(arviz.ELPDData, kind="loo")
        return new(**figures)
    old = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
    known = {old.get(name, name): value for name, value in figures.items() if value is not None}
    return arviz.ELPDData(data=list(known.values()), index=list(known))


def save_netcdf(results: Results, path: str | Path) -> Path:
    """Write the results of all models and fits into one netCDF file, as ArviZ's group "held_out".

    It holds `log_prob`, `variance`, `ess`, `khat`, `elbo`, ... with dimensions (fit, datum), NaN where a result
    has none; `model`, `direction`, `estimator`, `num_particles`, `seed`, `mean_log_prob`, `bias_bound` and `warning`
    of each fit; `cluster` of each datum, where there are clusters; `quantity`, `space`, `sha256` and `level` as
    attributes. `load_netcdf` reads the results back digit for digit, `arviz.from_netcdf` all of it as an InferenceData
    (0.23) or DataTree (1.x). Only results that `compare` accepts go together;
    the `marginal` of a result is another quantity, and is left to a file of its own.

    Args:
        results: a comparison, or what `compare` takes.
        path: file to write, for example `comparison.nc`.

    Returns:
        The path of the file.
    """
    from xarray import DataTree

    arviz = _arviz()
    comparison = results if isinstance(results, Comparison) else compare(results)
    dataset = _dataset(comparison)
    if _is_old(arviz):
        arviz.InferenceData(**{GROUP: dataset}).to_netcdf(str(path))
    else:
        DataTree.from_dict({GROUP: dataset}).to_netcdf(path, engine="h5netcdf")
    return Path(path)


def load_netcdf(path: str | Path) -> dict[str, LogLikelihood | list[LogLikelihood]]:
    """The results that `save_netcdf` wrote, ready for `compare`: model name to its result, or to a list of fits.

    Clusters and level are settings of the comparison: give them to `compare` again.

    Raises:
        ValueError: the file is another netCDF file.
    """
    from xarray import open_dataset

    try:
        dataset = open_dataset(path, group=GROUP, engine="h5netcdf")
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} must hold the group {GROUP!r} that save_netcdf writes: {error}") from error
    with dataset:
        fits: dict[str, list[LogLikelihood]] = {}
        for place, model in enumerate(dataset["model"].values):
            fits.setdefault(str(model), []).append(_read(dataset.isel(fit=place)))
    return {model: each if len(each) > 1 else each[0] for model, each in fits.items()}


def _arviz() -> Any:
    """The package, without the word on its next version that 0.23 has once a day: this file knows both."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"\s*ArviZ is undergoing")
        import arviz
    return arviz


def _is_old(arviz: Any) -> bool:
    """Whether this is ArviZ 0.x, with its InferenceData, and not 1.x."""
    return str(arviz.__version__).startswith("0.")


def _dataset(comparison: Comparison) -> Any:
    from xarray import Dataset

    pairs = [(row.model, dataclasses.replace(fit, marginal=None)) for row in comparison.rows for fit in row.fits]
    fits = [fit for _, fit in pairs]
    arrays: dict[str, Any] = {
        name: (("fit", "datum"), np.stack([_column(fit, name) for fit in fits])) for name in ARRAYS
    }
    texts = {
        "model": [model for model, _ in pairs],
        "direction": [fit.direction for fit in fits],
        "estimator": [fit.estimator for fit in fits],
        "warning": [fit.warning or "" for fit in fits],
        "meta": [str(to_arrays(fit)["meta"]) for fit in fits],
        "arrays": [json.dumps(_dtypes(fit)) for fit in fits],
    }
    numbers = {
        "num_particles": [fit.num_particles for fit in fits],
        "seed": [fit.seed for fit in fits],
        "mean_log_prob": [fit.mean for fit in fits],
        "bias_bound": [np.nan if fit.bias_bound is None else fit.bias_bound for fit in fits],
    }
    columns = {name: ("fit", np.array(values, dtype=object)) for name, values in texts.items()}
    columns |= {name: ("fit", np.array(values)) for name, values in numbers.items()}
    if comparison.num_clusters is not None:
        columns["cluster"] = ("datum", comparison.clusters.index)
    first = fits[0]
    same: dict[str, Any] = {"units": "nats", "space": str(first.space), "sha256": first.digest}
    same |= {"quantity": first.quantity, "level": comparison.level}
    return Dataset({**arrays, **columns}, attrs=same)


def _dtypes(fit: LogLikelihood) -> dict[str, str]:
    """Name and kind of each array that a result has."""
    values = {name: getattr(fit, name) for name in ARRAYS}
    return {name: str(array.dtype) for name, array in values.items() if array is not None}


def _column(fit: LogLikelihood, name: str) -> np.ndarray:
    values = getattr(fit, name)
    return np.full(len(fit), np.nan) if values is None else np.asarray(values, dtype=np.float64)


def _read(dataset: Any) -> LogLikelihood:
    """One fit out of the data set."""
    dtypes = json.loads(str(dataset["arrays"].values))
    arrays = {name: dataset[name].values.astype(dtype) for name, dtype in dtypes.items()}
    return from_arrays({**arrays, "meta": dataset["meta"].values})
