"""Latent variable models in Pyro, compared by held-out log-likelihood.

Everything public is here by name and is imported when it is first used, so that `import pyro_vae` costs nothing.
"""

import importlib

_HOMES = {
    "Batch": "data",
    "Data": "data",
    "load_data": "data",
    "Binary": "spaces",
    "Quantized": "spaces",
    "Real": "spaces",
    "Labels": "spaces",
    "Quadrants": "spaces",
    "fit": "fitting",
    "History": "history",
    "log_likelihood": "estimators.evaluate",
    "LogLikelihood": "estimators.result",
    "exact": "estimators.exact",
    "importance_sampling": "estimators.importance",
    "multilevel": "estimators.multilevel",
    "overdispersed": "estimators.proposals",
    "defensive": "estimators.proposals",
    "refined": "estimators.proposals",
    "tune_overdispersion": "estimators.tuning",
    "annealed_importance_sampling": "estimators.ais",
    "sandwich": "estimators.sandwich",
    "router": "estimators.router",
    "reverse_annealing": "estimators.reverse",
    "bracket": "estimators.reverse",
    "log_partition": "annealing",
    "compare": "comparison",
    "Comparison": "comparison",
    "compare_bounds": "bounds",
    "Bounds": "bounds",
    "plot_bound_curves": "plot_bounds",
    "latent_use": "usage.latent_use",
    "LatentUse": "usage.latent_use",
    "plot_latent_use": "plot_latents",
    "features": "codes",
    "linear_probe": "probe",
    "compare_probes": "probe",
    "Probe": "probe",
    "plot_restoration": "plot_uses",
    "plot_traversal": "plot_uses",
    "plot_outliers": "plot_uses",
    "restore": "restoration.restore",
    "Restoration": "restoration.task",
    "traverse": "traversal",
    "Traversal": "traversal",
    "interpolate": "traversal",
    "Scorer": "scores",
    "mutated": "scores",
    "conformal_p_values": "conformal",
    "false_discoveries": "conformal",
    "auroc": "roc",
    "to_arviz": "arviz",
    "parzen_window": "kernel_density",
    "save_netcdf": "arviz",
    "load_netcdf": "arviz",
}
_MODULES = ("models", "plots", "diagnostics", "traces", "checkpoint", "networks", "distributions", "guides", "testing")

__version__ = "0.1.0"
__all__ = sorted((*_HOMES, *_MODULES))


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
