"""What a pair does at its sites: which are latent, what law each has, and which one goes bad."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.nn import Parameter

from pyro_vae.traces.pair import Pair, Values
from pyro_vae.traces.records import latent_nodes, record, record_both, sample_sites


def latent_sites(pair: Pair, args: tuple[Tensor, ...]) -> tuple[list[str], list[str]]:
    """Names of the latent sites of the model and of the guide."""
    with torch.no_grad():
        guide_trace, model_trace = record_both(pair, args)
    return sorted(latent_nodes(model_trace)), sorted(latent_nodes(guide_trace))


def matching_sites(pair: Pair, args: tuple[Tensor, ...]) -> list[str]:
    """The latent sites, after checking that model and guide have the same ones; a ValueError lists both sets.

    The law at "obs" must be of whole data: another shape would be broadcast, and log p of a datum be that of many.
    """
    with torch.no_grad():
        guide_trace, model_trace = record_both(pair, args)
    in_model, in_guide = sorted(latent_nodes(model_trace)), sorted(latent_nodes(guide_trace))
    _check_event_shape(model_trace)
    if in_model != in_guide:
        hint = "" if in_guide else "; pass the guide as guide=..."
        raise ValueError(f"model and guide must have the same latent sites; model: {in_model}, guide: {in_guide}{hint}")
    return in_model


def _check_event_shape(trace: Any) -> None:
    """Raise a ValueError if the law at "obs" has events of another shape than the data there."""
    node = trace.nodes.get("obs")
    law = node["fn"] if node is not None and node["type"] == "sample" else None
    event_dim = getattr(law, "event_dim", 0)
    if law is None or not event_dim:
        return
    found, expected = tuple(law.event_shape), tuple(node["value"].shape[-event_dim:])
    if found != expected:
        raise ValueError(
            f"the law at site 'obs' has events of shape {found}, but the last {event_dim} dimensions of the data there "
            f"are {expected}: one would be broadcast to the other"
        )


@dataclass(frozen=True)
class Site:
    """A sample site of one run of a program, as it was found.

    Attributes:
        program: "model" or "guide".
        name: of the site.
        law: its distribution.
        value: what was drawn or observed there.
        log_prob: of the value, nats, in the shape that the law gives it, the scale included.
        scale: what Pyro multiplies the log-probability by.
        plates: {dim: name} of the plates around it.
        is_latent: whether it holds no data.
    """

    program: str
    name: str
    law: Any
    value: Tensor
    log_prob: Tensor
    scale: float | Tensor
    plates: dict[int, str]
    is_latent: bool


def sites(pair: Pair, args: tuple[Tensor, ...]) -> list[Site]:
    """Every sample site of one run of the guide, and of the model at the guide's draws, whatever they are worth."""
    found = []
    for program, trace in zip(("guide", "model"), record_both(pair, args), strict=True):
        trace.compute_log_prob()
        for name, site in sample_sites(trace):
            plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
            facts = site["fn"], site["value"], site["log_prob"], site["scale"], plates, not site["is_observed"]
            found.append(Site(program, name, *facts))
    return found


def laws(pair: Pair, args: tuple[Tensor, ...]) -> dict[str, Any]:
    """The law of every latent site of the model, {site: distribution}, at latents drawn from the guide."""
    with torch.no_grad():
        guide_trace, model_trace = record_both(pair, args)
    return {name: model_trace.nodes[name]["fn"] for name in latent_nodes(guide_trace)}


def auxiliary_sites(pair: Pair, args: tuple[Tensor, ...]) -> set[str]:
    """The latent sites that are there for the guide's sake alone: it marks them with `infer` "extends_model"."""
    with torch.no_grad():
        guide_trace, _ = record_both(pair, args)
    return {name for name, site in latent_nodes(guide_trace).items() if site["infer"].get("extends_model", False)}


def innermost(law: Any) -> Any:
    """The law whose independent copies a law consists of, or the law itself."""
    while isinstance(law, Independent):
        law = law.base_dist
    return law


def independent_normals(law: Any) -> Normal | None:
    """The independent normals that a law consists of, if it does."""
    inner = innermost(law)
    return inner if isinstance(inner, Normal) else None


def observation(pair: Pair, args: tuple[Tensor, ...]) -> Any:
    """The distribution at the site "obs", given latents drawn from the guide."""
    with torch.no_grad():
        nodes = record_both(pair, args)[1].nodes
    if "obs" not in nodes:
        sites = [name for name, node in nodes.items() if node["type"] == "sample"]
        raise ValueError(f"the data must be at the site 'obs' of the model, found the sites {sites}")
    return nodes["obs"]["fn"]


def observation_at(pair: Pair, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool) -> Any:
    """The distribution at "obs" given values of all latents, a row for each of K particles of each datum.

    Its batch shape is (num_particles, n), or (num_particles n,) on tiled data.
    """
    return record(poutine.condition(pair.model, data=values), args, num_particles, tiled).nodes["obs"]["fn"]


def reconstruct(pair: Pair, args: tuple[Tensor, ...]) -> Tensor:
    """The mean of p(x | z) at one draw z ~ q(z | x) for each datum; (n, *shape)."""
    return observation(pair, args).mean


def hidden_parameters(pair: Pair, args: tuple[Tensor, ...], known: Iterable[Tensor]) -> list[str]:
    """The torch parameters that the log-probabilities of a pair lead to, beside the `known` ones, in words."""
    leaves, those = _leaves(pair, args), {id(each) for each in known}
    named = {id(value): f"pyro.param {name!r}" for name, value in pyro.get_param_store().named_parameters()}
    hidden = [leaf for leaf in leaves if id(leaf) not in those and (id(leaf) in named or isinstance(leaf, Parameter))]
    return [named.get(id(leaf), f"a parameter of shape {tuple(leaf.shape)}") for leaf in hidden]


def _leaves(pair: Pair, args: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors at which the graph of one run ends."""
    with torch.enable_grad(), pyro.validation_enabled(False):
        totals = []
        for trace in record_both(pair, args):
            trace.compute_log_prob()
            totals += [site["log_prob"].sum() for _, site in sample_sites(trace)]
    waiting: list[Any] = [total.grad_fn for total in totals if total.requires_grad]
    seen, leaves = set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves += [node.variable] if hasattr(node, "variable") else []  # where gradients are accumulated
        waiting += [before for before, _ in node.next_functions]
    return leaves


def nonfinite_site(pair: Pair, args: tuple[Tensor, ...]) -> str | None:
    """The first site whose log-probability or value is not finite, as "site 'z' of the guide", or None."""
    with torch.no_grad(), pyro.validation_enabled(False):
        for program, trace in zip(("guide", "model"), record_both(pair, args), strict=True):
            trace.compute_log_prob()
            for name, site in sample_sites(trace):
                if not bool(site["log_prob"].isfinite().all() and site["value"].isfinite().all()):
                    return f"site {name!r} of the {program}"
    return None
