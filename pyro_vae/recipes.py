"""Which models stand in a comparison, and with which settings for how much data each is built and fitted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyro_vae import models, traces
from pyro_vae.configuration import check_suits, is_conditional, model_class, suits
from pyro_vae.data import Data
from pyro_vae.spaces import Binary

ALL = "all"
MAX_CLASSES = 100  # beyond it, the sum over labels leaves too few particles for each
LARGE = 10_000  # training data from which the settings of the literature for MNIST are taken

# How a VAE or CVAE is fitted unless one says otherwise: small data early stop, large data run their course.
FIT_SMALL = {"num_epochs": 300, "batch_size": 64, "learning_rate": 3e-3, "kl_warmup": 20, "patience": 60}
FIT_LARGE = {"num_epochs": 400, "batch_size": 256, "learning_rate": 4e-3, "validate_every": 5}
NET_SMALL = {"latent_dim": 16, "hidden_dims": [200, 200]}
NET_LARGE = {"latent_dim": 50, "hidden_dims": [200, 200]}
CHAIN_SMALL = {"num_epochs": 60, "batch_size": 64, "learning_rate": 3e-3, "patience": 20}


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: its name, the model's file name, and what differs from the defaults."""

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)


def default_entries(data: Data) -> list[Entry]:
    """The models that suit the data, from the simplest baseline up, with settings for their size."""
    large = len(data.train) >= LARGE
    neural: dict[str, Any] = {"options": NET_LARGE if large else NET_SMALL, "fit": FIT_LARGE if large else FIT_SMALL}
    if data.context is not None:
        baseline = {"num_epochs": 30 if large else 100, "patience": 5 if large else 20}
        return [
            Entry("baseline", "conditional_independent_pixel", fit=baseline),
            Entry("cvae", "cvae", **neural),
        ]
    entries = [Entry("independent_pixel", "independent_pixel"), *_mixtures(data, large)]
    entries += [Entry("ppca", "ppca", {"latent_dim": NET_LARGE["latent_dim"] if large else 16})]
    entries += [Entry("vae", "vae", **neural)]
    entries += [Entry("cvae", "cvae", **neural)] if 2 <= _num_classes(data) <= MAX_CLASSES else []
    return [entry for entry in entries if suits(entry.model, data.space)]


def _num_classes(data: Data) -> int:
    return 0 if data.train.labels is None else int(data.train.labels.max()) + 1


def _mixtures(data: Data, large: bool) -> list[Entry]:
    if isinstance(data.space, Binary):
        sizes = (100, 500) if large else (20,)
        return [Entry(f"bernoulli_mixture_{k}", "bernoulli_mixture", {"num_components": k}) for k in sizes]
    return [Entry("gmm", "gmm", {"num_components": 20 if large else 40})]


def all_entries(data: Data) -> list[Entry]:
    """The defaults and every other model of p(x) in models/ that suits the data, given or not."""
    entries = default_entries(data)
    there = {entry.model for entry in entries}
    others = [name for name in models.listing() if name not in there and _has_density(name, data)]
    return [*entries, *(_own_entry(name, data) for name in others)]


def _has_density(name: str, data: Data) -> bool:
    """Whether a model has a p(x) of these data: one that needs a context has p(x given it) only."""
    has = traces.lacks_log_prob(model_class(name)) is None
    return has and suits(name, data.space) and is_conditional(name) == (data.context is not None)


def _own_entry(name: str, data: Data) -> Entry:
    """A model outside the defaults, with settings for the size of the data where it needs some."""
    large = len(data.train) >= LARGE
    network: dict[str, Any] = {"fit": FIT_LARGE if large else FIT_SMALL}
    chain: dict[str, dict[str, Any]] = {
        "made": {"options": {"hidden_dims": [2000]}, "fit": {"num_epochs": 12, "batch_size": 100}},
        "pixel_cnn": {
            "options": {"num_channels": 24},
            "fit": {"num_epochs": 7, "batch_size": 32, "learning_rate": 2e-3},
        },
        "pixel_rnn": {"fit": {"num_epochs": 10}},
    }
    if not large:
        chain = {key: {"fit": CHAIN_SMALL} for key in chain}
    energies: dict[str, dict[str, Any]] = {
        "rbm": {"options": {"hidden_dim": 100}, "fit": {"num_epochs": 200, "learning_rate": 2e-2, "log_z_steps": 2000}},
        "energy": {},
    }
    if large:
        energies = {"rbm": {"fit": {"num_epochs": 50}}, "energy": {"fit": {"num_epochs": 8, "learning_rate": 5e-4}}}
    ladder = network if large else {**network, "options": {"latent_dims": [16, 8]}}
    recipes = {"ladder_vae": ladder, **chain, **energies}
    return Entry(name, name, **recipes.get(name, {}))


def named_entries(data: Data, names: Sequence[str]) -> list[Entry]:
    """Entries by name: of the defaults, "all", or any file in models/, with settings for the size of the data."""
    if list(names) == [ALL]:
        return all_entries(data)
    defaults = {entry.name: entry for entry in default_entries(data)}
    entries = []
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"rows must have different names, got {name} more than once")
        if name == ALL:
            raise ValueError(f"{ALL!r} stands for all rows, and alone, got {', '.join(names)}")
        entry = defaults.get(name)
        traces.check_has_log_prob(model_class(name if entry is None else entry.model))
        check_suits(name if entry is None else entry.model, data.space)
        entries.append(entry or _own_entry(name, data))
    return entries
