"""An estimator as the command line and a run directory name it: plain words and numbers, built when it is needed."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pyro_vae.estimators.ais import annealed_importance_sampling
from pyro_vae.estimators.estimate import Estimator
from pyro_vae.estimators.exact import exact
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.estimators.multilevel import multilevel
from pyro_vae.estimators.proposals import Proposal, defensive, overdispersed, refined
from pyro_vae.estimators.router import router
from pyro_vae.estimators.sandwich import sandwich
from pyro_vae.estimators.tuning import tune_overdispersion

if TYPE_CHECKING:
    from pyro_vae.data import Batch

ESTIMATORS = ("exact", "is", "is-jackknife", "multilevel", "ais", "smc", "router")
PROPOSALS = ("guide", "overdispersed", "defensive", "refined")
PARTICLES = {"is": 5000, "is-jackknife": 5000, "multilevel": 500, "router": 1000}
WITH_PROPOSAL = ("is", "is-jackknife", "multilevel", "ais", "smc")
TUNED = "tuned"


@dataclass(frozen=True)
class Choice:
    """Which estimator, with which settings.

    Attributes:
        estimator: one of `ESTIMATORS`; a model without latent sites is scored exactly whatever stands here.
        particles: K of importance sampling, of the first level or of the first stage; by the estimator if None.
        proposal: one of `PROPOSALS`, for importance sampling, multilevel, and annealing from the guide.
        overdispersion: factor on the guide's variance, or "tuned" for one that is chosen on validation data.
        steps: T of annealing; by default 1000, and 30 for the router's last stage.
        chains: of annealing.
        leapfrog: steps of each move of annealing.
        start: of annealing, "guide" or "prior".
        certify: whether to check the estimator from both sides on simulated data.
        simulated: how many data are simulated for that.
    """

    estimator: str = "is"
    particles: int | None = None
    proposal: str = "guide"
    overdispersion: float | str = 1.5
    steps: int | None = None
    chains: int = 16
    leapfrog: int = 10
    start: str = "guide"
    certify: bool = False
    simulated: int = 100

    def __post_init__(self) -> None:
        for name, known in (("estimator", ESTIMATORS), ("proposal", PROPOSALS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.proposal != "guide" and self.estimator not in WITH_PROPOSAL:
            raise ValueError(f"a proposal goes with {', '.join(WITH_PROPOSAL)}; {self.estimator!r} has none")
        if self.estimator == "exact" and self.certify:
            raise ValueError("an exact log-likelihood needs no certificate")

    def to_dict(self) -> dict[str, Any]:
        """The settings, for JSON."""
        return asdict(self)

    def build(self, model: nn.Module, valid: "Batch", *, seed: int = 0, device: str | None = None) -> Estimator:
        """The estimator; `valid` is what an over-dispersion is tuned on, if that is asked for."""
        proposal = self._proposal(model, valid, seed, device)
        estimator = self._plain(proposal)
        if not self.certify:
            return estimator
        return sandwich(
            estimator,
            num_steps=self.steps or 1000,
            num_chains=self.chains,
            num_leapfrog=self.leapfrog,
            start=self.start,
            proposal=proposal if self.start == "guide" else None,
            num_simulated=self.simulated,
        )

    def _plain(self, proposal: Proposal | None) -> Estimator:
        particles = self.particles or PARTICLES.get(self.estimator, 0)
        if self.estimator == "exact":
            return exact()
        if self.estimator in ("is", "is-jackknife", "multilevel"):
            if self.estimator == "multilevel":
                return multilevel(particles, proposal=proposal)
            return importance_sampling(particles, jackknife=self.estimator == "is-jackknife", proposal=proposal)
        if self.estimator == "router":
            start: dict[str, Any] = {"start": self.start, "proposal": refined() if self.start == "guide" else None}
            last = annealed_importance_sampling(self.steps or 30, self.chains, self.leapfrog, **start)
            return router(particles, annealing=last)
        resample = self.estimator == "smc"
        steps = self.steps or 1000
        how: dict[str, Any] = {"start": self.start, "resample": resample, "proposal": proposal}
        return annealed_importance_sampling(steps, self.chains, self.leapfrog, **how)

    def _proposal(self, model: nn.Module, valid: "Batch", seed: int, device: str | None) -> Proposal | None:
        if self.proposal == "overdispersed":
            factor = self.overdispersion
            if factor == TUNED:
                factor = tune_overdispersion(model, valid, seed=seed)
            return overdispersed(float(factor))
        if self.proposal == "defensive":
            return defensive()
        return refined() if self.proposal == "refined" else None
