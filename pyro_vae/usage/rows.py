"""One latent site: which of its units are active, and the KL divergence that each of them costs."""

from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from pyro_vae.bound_rows import Figure

ACTIVE = 0.01  # variance over the data of E[u | x] above which a unit u is active
LEVEL = 0.95  # of the interval by which a unit is called undecided


@dataclass(frozen=True, eq=False)
class SiteUse:
    """How a site is used; its units are the numbers of one draw, in their order.

    Attributes:
        name: of the site.
        variance: A_u = Var_x(E[u | x]) of each unit, shape (num_units,), without the variance that Monte Carlo adds to
            it, so that where it is 0 an estimate may lie a little below.
        variance_se: standard error of each over draws of the data, Monte Carlo noise included.
        kl: divergence of the whole site, E[log q - log p], nats per datum.
        kl_per_unit: E KL(q(u | x) || p(u)) of each unit, shape (num_units,), nats per datum; None if unknown.
        kl_per_unit_se: standard error of each over draws of the data.
        reason: why `kl_per_unit` is unknown, or None.
        prior: mean and scale of p(u) of each unit, shape (2, num_units), where it is one normal for all data.
        is_auxiliary: whether the site is no latent of the model but one that the guide adds to it, whose cost is in the
            KL all the same.
    """

    name: str
    variance: np.ndarray
    variance_se: np.ndarray
    kl: Figure
    kl_per_unit: np.ndarray | None
    kl_per_unit_se: np.ndarray | None
    reason: str | None
    prior: np.ndarray | None
    is_auxiliary: bool = False

    @property
    def num_units(self) -> int:
        """Numbers in one draw."""
        return len(self.variance)

    @property
    def active(self) -> np.ndarray:
        """Whether A_u > 0.01, shape (num_units,)."""
        return self.variance > ACTIVE

    @property
    def num_active(self) -> int:
        """Number of active units."""
        return int(self.active.sum())

    @property
    def active_range(self) -> tuple[int, int]:
        """Units whose 95% interval lies above 0.01, and units whose interval does not lie below it."""
        arm = NormalDist().inv_cdf((1 + LEVEL) / 2) * self.variance_se
        return int((self.variance - arm > ACTIVE).sum()), int((self.variance + arm > ACTIVE).sum())

    @property
    def unit_names(self) -> list[str]:
        """The site's name with the number of the unit, as in "z[3]"; without it for a single unit."""
        return [f"{self.name}[{unit}]" for unit in range(self.num_units)] if self.num_units > 1 else [self.name]

    def to_dict(self) -> dict[str, object]:
        """The figures as plain numbers and lists; nats, and A_u in the squared unit of the latents."""
        low, high = self.active_range
        return {
            "name": self.name,
            "is_auxiliary": self.is_auxiliary,
            "num_units": self.num_units,
            "num_active": self.num_active,
            "num_active_low": low,
            "num_active_high": high,
            "kl": asdict(self.kl),
            "reason": self.reason,
            "variance": self.variance.tolist(),
            "variance_se": self.variance_se.tolist(),
            "active": self.active.tolist(),
            "kl_per_unit": None if self.kl_per_unit is None else self.kl_per_unit.tolist(),
            "kl_per_unit_se": None if self.kl_per_unit_se is None else self.kl_per_unit_se.tolist(),
        }


def unit_variance(mean: np.ndarray, mean_variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""A_u = Var_x(E[u | x]) without bias, and its standard error over draws of the data.

    Of m_n = E[u | x_n] + e_n the variance over the data is too large by E e², so that

        A_u = 1/(N-1) Σ_n (m_n - m̄)² - 1/N Σ_n s_n²,    s_n² without bias for E e_n².

    Args:
        mean: m_n, shape (n, num_units).
        mean_variance: s_n², same shape; 0 where m_n is exact.

    Returns:
        Both of shape (num_units,).

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519.
    """
    count = len(mean)
    terms = (mean - mean.mean(0)) ** 2 * count / (count - 1) - mean_variance
    return terms.mean(0), terms.std(0, ddof=1) / np.sqrt(count)
