"""The contract between a model, its guide and this library, checked on a few data: `check_pair`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from torch import nn

from pyro_vae import pair_checks, pair_runs, traces
from pyro_vae.data import Batch, Data
from pyro_vae.pair_checks import Broken, Skip, Subject, tensors
from pyro_vae.randomness import derived_seed, own_randomness
from pyro_vae.traces import Pair, Program

NUM_DATA = 5  # rows that are looked at
STRUCTURE = ("runs", "latent sites", "per datum", "unscaled")  # without these no log weight means anything
CHECKS: dict[str, tuple[Callable[[Subject], str], tuple[str, ...]]] = {  # name: (check, what must have passed)
    "runs": (pair_checks.runs, ()),
    "latent sites": (pair_checks.latent_sites, ("runs",)),
    "per datum": (pair_checks.per_datum, ("runs",)),
    "unscaled": (pair_checks.unscaled, ("runs",)),
    "reparameterised": (pair_checks.reparameterised, STRUCTURE),
    "gradients": (pair_checks.gradients, STRUCTURE),
    "alone": (pair_runs.alone, STRUCTURE),
    "particles": (pair_runs.particles, STRUCTURE),
    "normalised": (pair_runs.normalised, (*STRUCTURE, "particles")),
    "same seed": (pair_runs.same_seed, ("runs",)),
    "random state": (pair_runs.random_state, ("runs",)),
    "state": (pair_runs.state, ("runs",)),
}


@dataclass(frozen=True)
class Check:
    """One check: its name, "passed", "failed" or "skipped", and what was found or why it was skipped."""

    name: str
    outcome: str
    detail: str


@dataclass(frozen=True, repr=False)
class Report:
    """All checks of a pair in the order in which they were done; as text, a table."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> tuple[Check, ...]:
        """The checks that passed."""
        return self._those("passed")

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return self._those("failed")

    @property
    def skipped(self) -> tuple[Check, ...]:
        """The checks that could not be done; the detail says why."""
        return self._those("skipped")

    def _those(self, outcome: str) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.outcome == outcome)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{check.name:<{width}}  {check.outcome:<7}  {check.detail}" for check in self.checks]
        counts = f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"
        return "\n".join([*lines, counts])

    __repr__ = __str__


class PairError(ValueError):
    """A model and a guide that break the contract; the message lists every failure, `report` holds all checks."""

    def __init__(self, report: Report) -> None:
        lines = [f"- {check.name}: {check.detail}" for check in report.failed]
        super().__init__("\n".join([f"model and guide fail {len(lines)} of {len(report.checks)} checks:", *lines]))
        self.report = report


def check_pair(
    model: nn.Module | Program,
    guide: Program | None = None,
    *,
    data: Batch | Data,
    seed: int = 0,
    raise_on_failure: bool = True,
) -> Report:
    """Check what a model and a guide must keep for `fit`, every estimator and every bound to be right about them.

    - runs: both programs run.
    - latent sites: both have the same ones.
    - per datum: every site lies in the plate "data" at dim -1, with a log-probability for each datum.
    - unscaled: no site has a scale other than 1.
    - reparameterised: draws of a law with `rsample` carry gradients; skipped, by name, for laws without.
    - gradients: the ELBO has a finite gradient that is not 0 for every parameter, at these parameters or beside them.
      Those of a model's own guide need none where another guide stands in its place.
    - alone: log q(z | x_i) and log p(x_i, z) of a datum are the same alone and in a batch, in training mode too.
    - particles: the programs run under an outer plate of particles or on tiled data, with the weights of single runs.
    - normalised: ∫ q(z | x) dz = 1 for two data, by a sum over states, on a grid (1 or 2 dimensions) and by sampling,
      which also sees draws that do not follow the density.
    - same seed: the same draws for the same seed of torch.
    - random state: nothing sets a seed, and Python's and numpy's generators stay as they were.
    - state: no parameter, buffer or mode changes in evaluation mode, and nothing enters Pyro's global store.

    The pair, its modes and the global random state are as before afterwards.

    Args:
        model: one of our models, or any Pyro model called as `model(obs)` or `model(obs, context)`.
        guide: the guide of a model that has none of its own, or another one in its place.
        data: a batch or data set, of which a few rows are used; obs (n, ...), n at least 2.
        seed: of the rows and of the draws.
        raise_on_failure: whether a failure is raised or only reported.

    Returns:
        Every check with its outcome.

    Raises:
        PairError: a check failed; all that failed are listed.
        ValueError: fewer than two data.
    """
    batch = data.valid if isinstance(data, Data) else data
    if len(batch) < 2:
        raise ValueError(f"data must hold at least 2 data, or none can be told from its batch, got {len(batch)}")
    traces.check_has_log_prob(model)
    pair = traces.as_pair(model, guide)
    few = batch.subset(min(NUM_DATA, len(batch)), seed)
    own = traces.as_pair(model) if guide is not None and hasattr(model, "guide") else None
    parameter = next((p for root in pair.modules for p in root.parameters() if p.is_floating_point()), torch.zeros(()))
    args = tuple(arg.to(parameter if arg.is_floating_point() else parameter.device) for arg in few.arguments)
    with _as_before(pair), torch.enable_grad(), own_randomness(seed, parameter.device):
        report = Report(tuple(_done(Subject(pair, args, own, seed))))
    if report.failed and raise_on_failure:
        raise PairError(report)
    return report


def _done(subject: Subject) -> Iterator[Check]:
    outcomes: dict[str, str] = {}
    for place, (name, (check, needed)) in enumerate(CHECKS.items()):
        missing = [other for other in needed if outcomes[other] != "passed"]
        if missing:
            found = Check(name, "skipped", f"needs {', '.join(missing)}")
        else:
            with own_randomness(derived_seed(subject.seed, place), subject.device):
                found = _outcome(name, check, subject)
        outcomes[name] = found.outcome
        yield found


def _outcome(name: str, check: Callable[[Subject], str], subject: Subject) -> Check:
    """What a check says; whatever else a user's program raises is a failure of the check that ran it."""
    try:
        return Check(name, "passed", check(subject))
    except Skip as reason:
        return Check(name, "skipped", str(reason))
    except Broken as error:
        return Check(name, "failed", str(error))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Check(name, "failed", f"{type(error).__name__}: {first}")


@contextmanager
def _as_before(pair: Pair) -> Iterator[None]:
    """Evaluation mode inside; parameters, buffers, modes and Pyro's store as before at the end."""
    values = {tensor: tensor.detach().clone() for root in pair.modules for tensor in tensors(root)}
    modes = {module: module.training for root in pair.modules for module in root.modules()}
    known = set(pyro.get_param_store().keys())
    try:
        for root in pair.modules:
            root.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)
        for name in set(pyro.get_param_store().keys()) - known:
            del pyro.get_param_store()[name]
