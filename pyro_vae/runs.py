"""Run directories: a configuration, the fit it describes, its checkpoint, its evaluation, read back by name."""

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_vae import checkpoint, distributed, plugins, svi, traces
from pyro_vae.configuration import Config, check_settings
from pyro_vae.data import Data
from pyro_vae.fitting import fit
from pyro_vae.history import History
from pyro_vae.traces import Pair, Program

EVALUATION = ("evaluation.npz", "evaluation.csv", "evaluation.json", "evaluation_marginal.csv")
PICTURES = ("samples.png", "reconstructions.png", "elbo.png")
GUIDE = "guide.py"  # the file of a guide of the user's, as it was at the fit
WRITTEN = ("fit.json", "checkpoint.pt", GUIDE, "history.csv", *EVALUATION, *PICTURES)


@dataclass(frozen=True)
class Run:
    """A fitted model with its configuration and data, as read from a run directory; its guide if none of its own."""

    path: Path
    config: Config
    data: Data
    model: nn.Module
    guide: Program | None = None

    @property
    def pair(self) -> Pair:
        """Model and guide."""
        return traces.as_pair(self.model, self.guide)


def train(
    config: Config,
    out: Path,
    *,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[Run, History]:
    """Fit the model of a configuration into the directory `out`: config.json, history.csv, checkpoint.pt, fit.json.

    A run that is there already is neither taken for this one nor lost: it goes on with `resume`, if it is the same
    run, and is replaced with `overwrite`; else a ValueError says so.
    """
    if resume:
        _check_same(Config.load(out / "config.json"), config, out)
    elif (out / "config.json").is_file() and not overwrite:
        raise ValueError(f"{out} holds a run already: --resume goes on with it, --overwrite starts anew")
    check_settings(config.model, config.fit)
    source = None if config.guide is None else plugins.locate(config.guide)
    data = config.load_data()
    model, guide = config.build(data, source)
    if not resume:
        _check_not_its_own(source, out)
    distributed.wait()  # until all have seen what is there
    if distributed.is_first():
        if not resume:
            _clear(out)
        config.save(out / "config.json")
        _keep(source, out)
    how: dict[str, Any] = {"device": device, "out": out, "resume": resume, "progress": progress}
    cpu = time.process_time()
    history = fit(model, data, guide=guide, seed=config.start_seed, **how, **config.fit)
    cpu = time.process_time() - cpu
    roots = nn.ModuleList(traces.as_pair(model, guide).modules).cpu()  # where the data lie
    record = {
        "status": history.status,
        "best_epoch": history.best_epoch,
        "best_valid_elbo": history.best_valid_elbo,
        "seconds": history.seconds,
        "cpu_seconds": cpu,
        "ran_as": history.ran_as,
        "no_graph_because": history.reason or None,
        "threads": torch.get_num_threads(),  # and seconds, of each process
        "processes": distributed.size(),
        "num_parameters": sum(p.numel() for p in roots.parameters()),
        "test_sha256": data.test.digest,
        "guide": None if source is None else source.record,
    }
    if distributed.is_first():
        (out / "fit.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if history.status != "interrupted":
        distributed.wait()
    return Run(out, config, data, model, guide), history


def _check_not_its_own(source: plugins.Source | None, out: Path) -> None:
    """The copy of a guide that a run keeps is cleared with the run."""
    if source is not None and source.path == (out / GUIDE).resolve():
        raise ValueError(f"{source.path} is the copy that the run in {out} keeps, and goes with it: copy it elsewhere")


def _keep(source: plugins.Source | None, out: Path) -> None:
    """A copy of the guide's file beside the fit; a fit that goes on must have been started with the same."""
    if source is None or source.path is None:
        return
    copy = out / GUIDE
    if not copy.is_file():
        shutil.copyfile(source.path, copy)
    elif plugins.digest(copy) != source.sha256:
        raise ValueError(f"cannot resume {out}: {source.path} has changed; the code as it was lies in {copy}")


def _check_same(there: Config, asked: Config, out: Path) -> None:
    """Raise a ValueError that names what differs, unless both are the same run."""
    names = [field.name for field in dataclasses.fields(Config)]
    differ = [
        f"{n} was {getattr(there, n)}, now {getattr(asked, n)}" for n in names if getattr(there, n) != getattr(asked, n)
    ]
    if differ:
        text = f"cannot resume {out}: its config.json differs from the run asked for: {'; '.join(differ)}"
        raise ValueError(f"{text} (--overwrite starts anew)")


def _clear(out: Path) -> None:
    """Remove what an earlier run left: were this one killed, a resumed run must not take it for its own."""
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)


def open_run(path: Path, *, data: str | None = None, root: str | None = None) -> Run:
    """Read a run directory back: configuration, data (from `data` or `root`, if they have moved) and the fitted model.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: the test data or the guide's file are not those that the run was made for.
    """
    config = Config.load(path / "config.json")
    if not (path / "fit.json").is_file():
        raise FileNotFoundError(f"the fit in {path} has not ended: fit.json is missing; go on with --resume")
    config = dataclasses.replace(config, data=data or config.data, root=root or config.root)
    record = fit_record(path)
    source = config.guide and plugins.locate_again(config.guide, record["guide"], path / GUIDE)
    loaded = config.load_data()
    model, guide = config.build(loaded, source or None)
    _load_parameters(path / "checkpoint.pt", model, guide)
    for module in traces.as_pair(model, guide).modules:
        svi.mark_fitted(module)
    digest = record["test_sha256"]
    if digest != loaded.test.digest:
        raise ValueError(
            f"the test data of {path} had SHA-256 {digest}, those found now have {loaded.test.digest}: the data set "
            "has changed"
        )
    return Run(path, config, loaded, model, guide)


def _load_parameters(path: Path, model: nn.Module, guide: Program | None) -> None:
    state = checkpoint.load(path)
    if guide is None:
        model.load_state_dict(state["model"])
        model.eval()
    else:  # all modules of the pair, a function may close over several
        roots = nn.ModuleList(traces.as_pair(model, guide).modules)
        roots.load_state_dict(state["best"]["model"] or state["last"])
        roots.eval()


def fit_record(path: Path) -> dict[str, Any]:
    """What `train` noted of the fit: status, seconds, parameters."""
    return json.loads((path / "fit.json").read_text(encoding="utf-8"))
