"""Tiny data and models for the tests, and arrays read back."""

import inspect
from dataclasses import replace

import numpy as np
import torch

from pyro_vae import models
from pyro_vae.data import Batch, Data
from pyro_vae.energy import EnergyBased
from pyro_vae.spaces import Binary, Labels, Quadrants, Quantized, Real
from pyro_vae.traces import lacks_log_prob

SIZES = {  # for any constructor that has an argument of this name
    "latent_dim": 2,
    "latent_dims": (2, 1),
    "hidden_dim": 8,
    "hidden_dims": (8, 8),
    "num_components": 2,
    "num_layers": 2,
    "num_steps": 2,
    "num_hidden": 4,
    "num_channels": 4,
    "num_features": 3,
    "rank": 1,
}


def spaces_of(shape):
    """One space of each kind."""
    return Binary(shape), Quantized(shape, levels=3 if len(shape) == 2 and max(shape) < 3 else 5), Real(shape)


def has_argument(cls, name):
    return name in inspect.signature(cls).parameters


def contexts_of(cls, shape):
    """The contexts that a class is built with; None where its constructor takes none."""
    if not has_argument(cls, "context"):
        return (None,)
    return Labels(log_prob=(-1.5, -1.0, -0.9)), Quadrants(1, shape)


def observed_space(space, context):
    """Where the observations live, once a context has taken its pixels away."""
    if not isinstance(context, Quadrants):
        return space
    return replace(space, shape=(space.num_dims - context.num_dims,))


def cases(shape, kinds=None):
    """(name, observed space, context) of every model in the folder with a p(x); `kinds` limits the kinds of space."""
    return [case for case in all_cases(shape, kinds) if lacks_log_prob(getattr(models, case[0])) is None]


def all_cases(shape, kinds=None):
    """The same, and those of the models without p(x)."""
    found = []
    for name in models.listing().values():
        cls = getattr(models, name)
        for space in spaces_of(shape):
            if isinstance(space, cls.spaces) and (kinds is None or isinstance(space, kinds)):
                found += [(name, observed_space(space, each), each) for each in contexts_of(cls, shape)]
    return found


def cases_of_svi(shape, kinds=None):
    """Those whose log p, or bound, has the gradient that SVI follows: an energy's lacks that of its constant."""
    return [case for case in cases(shape, kinds) if not hasattr(getattr(models, case[0]), "estimate_log_partition")]


def case_id(case):
    name, space, context = case
    return "-".join(str(part) for part in (name, space, context) if part is not None)


def build(case, seed=0, **options):
    """A tiny model whose random start comes from `seed`; the global random state stays as it was."""
    name, space, context = case
    cls = getattr(models, name)
    sizes = {key: value for key, value in SIZES.items() if has_argument(cls, key)}
    args = (space,) if context is None else (space, context)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return _with_constant(cls(*args, **{**sizes, **options}))


def _with_constant(model):
    """An energy model has a log p(x) once its log Z is known: by a sum where that is cheap, else roughly."""
    if isinstance(model, EnergyBased):
        if model.space.num_dims <= 4:
            model.sum_log_partition()
        else:
            model.estimate_log_partition(3, num_chains=4, num_repeats=1, doubled=False)
    return model


def random_obs(space, num, seed=0):
    """Observations in the space, (num, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(space, Real):
        return torch.randn(num, *space.shape, generator=generator)
    levels = space.levels if isinstance(space, Quantized) else 2
    return torch.randint(levels, (num, *space.shape), generator=generator).float()


def random_context(context, num, seed=0):
    """Contexts (num, num_dims): one-hot labels, or given pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed + 100)
    if isinstance(context, Labels):
        labels = torch.randint(context.num_dims, (num,), generator=generator)
        return torch.nn.functional.one_hot(labels, context.num_dims).float()
    return None if context is None else torch.rand(num, context.num_dims, generator=generator)


def random_args(case, num=5, seed=0):
    """What the programs of a model are called with: (obs,) or (obs, context)."""
    _, space, context = case
    obs, given = random_obs(space, num, seed), random_context(context, num, seed)
    return (obs,) if given is None else (obs, given)


def random_data(case, sizes=(8, 4, 3), dtype=torch.float32):
    """Random train, validation and test data for a model."""
    _, space, context = case
    parts = ((arg.to(dtype) for arg in random_args(case, num, seed)) for seed, num in enumerate(sizes))
    return Data("random", space, *(Batch(*part, space=space) for part in parts), context=context)


def arguments(batch):
    """What the programs of a model are called with, for a batch."""
    return (batch.obs,) if batch.context is None else (batch.obs, batch.context)


def parameters(module):
    """A copy of all parameters, by name."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(left, right):
    """Whether two dicts of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def read_arrays(path):
    """The arrays of an .npz file, by name."""
    with np.load(path) as file:
        return dict(file)
