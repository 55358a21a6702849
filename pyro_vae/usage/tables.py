"""The use of latents as plain text: the ELBO taken apart, the sites, the units, remarks."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pyro_vae.bound_rows import Figure
from pyro_vae.tables import SYMBOLS, align, number, wrapped
from pyro_vae.usage.rows import ACTIVE, LEVEL, SiteUse

Figures = Mapping[str, Figure | None]
PARTS = {  # of the ELBO, by the names that `LatentUse` gives them, with the side on which the population's value lies
    "elbo": ("ELBO", ""),
    "reconstruction": ("= reconstruction, E log p(x | z)", ""),
    "kl": ("- KL(q(z | x) || p(z))", ""),
    "mutual_information": ("    = mutual information of x and z", SYMBOLS["lower"]),
    "marginal_kl": ("    + marginal KL(q(z) || p(z))", SYMBOLS["upper"]),
}

LINES = 20  # units of a site that the table shows
OWN_SHARE = 0.1  # of q(z) at a draw that its own datum holds, from which log N bounds the mutual information

LEGEND = f"""\
≥ the mutual information in the population of the data is at least this, ≤ its marginal KL at most this
A_u: variance over the data of E[u | x], active above {ACTIVE:g}   MC SE: for these data   SE: over draws of the data"""


def table(figures: Figures, sites: Sequence[SiteUse], notes: Sequence[str], place: str) -> str:
    """All tables and the remarks; nats per datum."""
    rows = [[words, *_cells(figures[name], symbol)] for name, (words, symbol) in PARTS.items()]
    lines = [f"Use of the latents in nats, {place}", "", *align([["", "nats", "MC SE", "SE"], *rows], "<>>>")]
    lines += ["", *_sites_lines(sites)]
    for site in sites:
        lines += [] if site.is_auxiliary else ["", *_unit_lines(site)]
    return "\n".join([*lines, "", LEGEND, *wrapped(notes)])


def _cells(figure: Figure | None, symbol: str = "") -> list[str]:
    if figure is None:
        return ["—"] * 3
    mean = round(figure.mean, 3) + 0.0  # no -0.000
    return [number(mean, 3, symbol=symbol), number(figure.mc_se, 3), number(figure.se, 3)]


def _sites_lines(sites: Sequence[SiteUse]) -> list[str]:
    head = ["site", "units", "active", f"{100 * LEVEL:g}%", "KL", "MC SE", "SE"]
    return align([head, *map(_site_cells, sites)], "<" + ">" * (len(head) - 1))


def _site_cells(site: SiteUse) -> list[str]:
    low, high = site.active_range
    decided = f"{low}" if low == high else f"{low} to {high}"
    return [site.name, str(site.num_units), str(site.num_active), decided, *_cells(site.kl)]


def _unit_lines(site: SiteUse) -> list[str]:
    """The units that cost most, or where that is unknown those that vary most."""
    order, head = order_of_units(site), ["unit", "A_u", "SE", ""]
    columns = [(site.variance, 4), (site.variance_se, 4)]
    if site.kl_per_unit is not None and site.kl_per_unit_se is not None:
        head[1:1] = ["KL", "SE"]
        columns[:0] = [(site.kl_per_unit, 3), (site.kl_per_unit_se, 3)]
    rows = [head]
    for unit in order[:LINES]:
        figures = [number(float(values[unit]), digits) for values, digits in columns]
        rows.append([site.unit_names[unit], *figures, "active" if site.active[unit] else ""])
    lines = align(rows, "<" + ">" * len(columns) + "<")
    rest = order[LINES:]
    return [*lines, f"... {len(rest)} more, {int(site.active[rest].sum())} of them active"] if len(rest) else lines


def order_of_units(site: SiteUse) -> np.ndarray:
    """Numbers of the units, the most used first: by KL, or where that is unknown by A_u."""
    return np.argsort(-(site.variance if site.kl_per_unit is None else site.kl_per_unit), kind="stable")


def remarks(figures: Figures, sites: Sequence[SiteUse], skipped: str | None, num_data: int) -> list[str]:
    """What a reader must know beside the numbers: collapse, log N, what is unknown and why."""
    said = [text for site in sites if not site.is_auxiliary for text in _collapse(site)]
    said += [f"Note: {site.name} is the guide's own and no latent of the model" for site in sites if site.is_auxiliary]
    said += _ceiling(figures["mutual_information"], figures["kl"], num_data)
    said += [f"Note: no mutual information: {skipped}"] if skipped else []
    unknown = [site for site in sites if site.reason and not site.is_auxiliary]
    return said + [f"Note: no KL of each unit of {site.name}: {site.reason}" for site in unknown]


def _collapse(site: SiteUse) -> list[str]:
    """How many units are active, where not all are, and what the others cost."""
    if site.num_active == site.num_units:
        return []
    if site.num_active == 0:
        who = "its one unit is not" if site.num_units == 1 else f"none of its {site.num_units} units is"
        rest = f"E[{site.name} | x] is almost the same for all x, at a KL of {site.kl.mean:.3f} nats"
        return [f"Posterior collapse of {site.name}: {who} active: {rest}."]
    said = f"{site.name}: {site.num_active} of {site.num_units} units {'is' if site.num_active == 1 else 'are'} active"
    if site.kl_per_unit is None:
        return [f"{said}."]
    idle = float(site.kl_per_unit[~site.active].sum())
    return [f"{said}; the others hold {idle:.3f} of {site.kl.mean:.3f} nats of KL."]


def _ceiling(found: Figure | None, kl: Figure | None, num_data: int) -> list[str]:
    """The mutual information of N data cannot exceed log N, whatever that of the population is."""
    if found is None or kl is None or found.mean < math.log(num_data * OWN_SHARE):
        return []
    top = f"log N = {math.log(num_data):.3f}, which it cannot exceed with {num_data} data"
    rest = f"in the population it may be anything up to the KL, {kl.mean:.3f}, and the marginal KL as much smaller"
    return [f"Note: the mutual information {found.mean:.3f} is near {top}: {rest}"]
