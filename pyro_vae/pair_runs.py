"""What the runs of a pair must give: per datum, per particle, a density, and nothing left behind."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae import traces
from pyro_vae.latents import Latents
from pyro_vae.normalisation import one_by_grid, one_by_sampling, one_by_sum
from pyro_vae.pair_checks import Broken, Skip, Subject, label_of, named_list, need_latents, roots_of
from pyro_vae.randomness import own_randomness
from pyro_vae.traces import Pair, Values

RTOL, ATOL = 1e-4, 1e-3  # float32 rounding of matrix products of another size


@torch.no_grad()
def alone(subject: Subject) -> str:
    """What is said of a datum depends on no other, in evaluation and in training mode."""
    programs = {"log p(x, z)": subject.pair.model}
    if subject.latents and subject.no_density is None:
        programs["log q(z | x)"] = subject.pair.guide
    for mode in ("evaluation", "training"):
        for what, program in programs.items():
            with _training(subject.pair, mode == "training"), pyro.validation_enabled(False):
                _check_alone(subject, Pair(program, program), f"{what} in {mode} mode")
    rest = "; log q(z | x) has no value at given z" if subject.latents and len(programs) == 1 else ""
    return f"{' and '.join(programs)} of {len(subject.args[0])} data{rest}"


def _check_alone(subject: Subject, pair: Pair, what: str) -> None:
    try:
        together = traces.log_joint(pair, subject.args, subject.draws, 1, tiled=True)[0]
        singly = [_row(subject, pair, row) for row in range(len(together))]
    except (ValueError, RuntimeError) as error:  # as batch normalisation does, for a single datum
        raise Broken(f"{what} of one datum: {error}") from error
    if not torch.allclose(torch.cat(singly), together, rtol=RTOL, atol=ATOL):
        far = float((torch.cat(singly) - together).abs().max())
        raise Broken(f"{what} of a datum differs by {far:.3g} nats when it is alone (dropout? batch normalisation?)")


def _row(subject: Subject, pair: Pair, row: int) -> Tensor:
    index = torch.tensor([row], device=subject.device)
    values = {
        site.name: site.value.detach().index_select(site.value.ndim - site.law.event_dim - 1, index)
        for site in subject.latents
    }
    return traces.log_joint(pair, tuple(arg[index] for arg in subject.args), values, 1, tiled=True)[0]


@contextmanager
def _training(pair: Pair, mode: bool) -> Iterator[None]:
    for root in pair.modules:
        root.train(mode)
    try:
        yield
    finally:
        for root in pair.modules:
            root.eval()


@torch.no_grad()
def particles(subject: Subject) -> str:
    """Several particles of a datum can be weighed at once."""
    with pyro.validation_enabled(False):
        if not subject.tiled:
            return "under an outer plate"
        weights = traces.log_weights(subject.pair, subject.args, 3, tiled=True)
    if not bool(weights.isfinite().all()):
        raise Broken("log p(x, z) - log q(z | x) is not finite on tiled data")
    return "not under an outer plate: on tiled data, one run of the encoder for each particle"


@torch.no_grad()
def normalised(subject: Subject) -> str:
    """∫ q(z | x) dz = 1, and the draws are those of this density."""
    need_latents(subject)
    if subject.no_density is not None:
        raise Skip(subject.no_density)
    args = tuple(arg[:2] for arg in subject.args)
    try:
        latents = Latents(subject.pair, args, subject.tiled)
    except ValueError as error:
        raise Skip(str(error)) from error
    with pyro.validation_enabled(False):
        ways = (one_by_grid, one_by_sampling) if latents.dim else (one_by_sum,)
        found = [integral for integral in (way(latents, args) for way in ways) if integral is not None]
    if not found:
        raise Skip(f"the draws of q(z | x) are too far from a normal in {latents.dim} dimensions for an estimate")
    text = f"∫ q(z | x) dz is {', '.join(map(str, found))}"
    if not all(integral.is_one for integral in found):
        raise Broken(f"{text}, expected 1 (a wrong density, or draws that do not follow it)")
    return text


@torch.no_grad()
def same_seed(subject: Subject) -> str:
    """The same seed gives the same draws."""
    first, again = (_drawn(subject, subject.seed) for _ in range(2))
    other = [name for name in first if not torch.equal(first[name], again[name])]
    if other:
        raise Broken(f"the draws at {named_list(other)} differ between two runs from the same seed of torch")
    return f"the same draws at {named_list(first)}" if first else "no latent sites"


@torch.no_grad()
def random_state(subject: Subject) -> str:
    """Nothing but torch's own stream of random numbers is touched, and that is only read on."""
    before = random.getstate(), _numpy_state()
    ends = []
    for seed in (subject.seed, subject.seed + 1):
        with own_randomness(seed, subject.device):
            traces.sites(subject.pair, subject.args)
            ends.append(torch.get_rng_state())
    after = random.getstate(), _numpy_state()
    moved = [name for name, a, b in zip(("Python's random", "numpy"), before, after, strict=True) if a != b]
    moved += ["torch, which was given a seed"] * torch.equal(*ends)
    if moved:
        raise Broken(f"the programs change the random state of {', '.join(moved)}")
    return "torch's stream is read on, no other is touched"


def _numpy_state() -> tuple[object, ...]:
    state = np.random.get_state()  # noqa: NPY002 (the global one is what is looked at)
    return tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in state)


@torch.no_grad()
def state(subject: Subject) -> str:
    """A run changes nothing that outlasts it."""
    roots = roots_of(subject)
    held = {**dict(roots.named_parameters()), **dict(roots.named_buffers())}
    before = {name: value.clone() for name, value in held.items()}
    modes = {module: module.training for root in roots for module in root.modules()}
    traces.sites(subject.pair, subject.args)
    changed = [label_of(subject, name) for name, value in held.items() if not torch.equal(value, before[name])]
    changed += [f"the mode of {type(module).__name__}" for module, mode in modes.items() if module.training != mode]
    entered = sorted(set(pyro.get_param_store().keys()) - subject.known)
    if changed:
        raise Broken(f"a run in evaluation mode changes {', '.join(changed)}")
    if entered:
        raise Broken(
            f"{named_list(entered)} entered Pyro's global store, which `fit` does not see: use an nn.Parameter"
        )
    return "nothing changed"


def _drawn(subject: Subject, seed: int) -> Values:
    with own_randomness(seed, subject.device):
        found = traces.sites(subject.pair, subject.args)
    return {site.name: site.value for site in found if site.program == "guide" and site.is_latent}
