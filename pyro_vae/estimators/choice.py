"""An estimator as the command line and a run directory name it: plain words and numbers, built when it is needed."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pyro_vae.checks import check_choice
from pyro_vae.estimators.ais import annealed_importance_sampling
from pyro_vae.estimators.estimate import Estimator
from pyro_vae.estimators.exact import exact
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.estimators.multilevel import multilevel
from pyro_vae.estimators.names import ESTIMATORS, PRECISIONS, PROPOSALS
from pyro_vae.estimators.proposals import Proposal, defensive, overdispersed, refined
from pyro_vae.estimators.reverse import reverse_annealing
from pyro_vae.estimators.router import router
from pyro_vae.estimators.sandwich import sandwich
from pyro_vae.estimators.tuning import tune_overdispersion
from pyro_vae.traces import Program

if TYPE_CHECKING:
    from pyro_vae.data import Batch

PARTICLES = {"is": 5000, "is-jackknife": 5000, "multilevel": 500, "router": 1000}
WITH_PROPOSAL = ("is", "is-jackknife", "multilevel", "ais", "smc")
ANNEALED = ("ais", "smc", "router")
REVERSED = "raise"  # annealing too, but of energy models only, which have no proposal and no leapfrog steps
STREAMED = ("is", "is-jackknife", "multilevel")
TUNED, DEFAULT_FACTOR = "tuned", 1.5


@dataclass(frozen=True)
class Choice:
    """Which estimator, with which settings.

    What is None takes its default when the estimator is built; a setting that the estimator would ignore is refused.

    Attributes:
        estimator: one of `ESTIMATORS`; a model without latent sites is scored exactly whatever stands here.
        particles: K of importance sampling, of the first level or of the first stage; by the estimator if None.
        proposal: one of `PROPOSALS`, for importance sampling, multilevel, and annealing from the guide.
        overdispersion: factor on the guide's variance, 1.5 by default, or "tuned" on validation data.
        steps: T of annealing; by default 1000, and 30 for the router's last stage.
        chains: of annealing; 16 by default.
        leapfrog: steps of each move of annealing; 10 by default.
        start: of annealing, "guide" (the default) or "prior".
        certify: whether to check the estimator from both sides on simulated data; an energy model is bracketed, see
            `bracket`.
        simulated: how many data are simulated for that (of an energy model, looked at from below); 100 by default.
        precision: of the model's linear layers, one of `PRECISIONS`, for importance sampling and multilevel; "float32"
            by default.
    """

    estimator: str = "is"
    particles: int | None = None
    proposal: str = "guide"
    overdispersion: float | str | None = None
    steps: int | None = None
    chains: int | None = None
    leapfrog: int | None = None
    start: str | None = None
    certify: bool = False
    simulated: int | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("estimator", ESTIMATORS), ("proposal", PROPOSALS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        if self.proposal != "guide" and self.estimator not in WITH_PROPOSAL:
            raise ValueError(f"a proposal goes with {', '.join(WITH_PROPOSAL)}; {self.estimator!r} has none")
        if self.estimator == "exact" and self.certify:
            raise ValueError("an exact log-likelihood needs no certificate")
        if self.estimator == REVERSED and self.certify:
            raise ValueError("raise is the lower side alone; both sides of an energy model: certify without it")
        annealed = self.certify or self.estimator in ANNEALED
        applies = {
            "particles": (self.estimator in PARTICLES, f"estimators {', '.join(PARTICLES)}"),
            "overdispersion": (self.proposal == "overdispersed", "the proposal overdispersed"),
            **{
                name: (annealed or self.estimator == REVERSED, f"{', '.join(ANNEALED)}, {REVERSED} and certify")
                for name in ("steps", "chains")
            },
            **{name: (annealed, f"{', '.join(ANNEALED)} and certify") for name in ("leapfrog", "start")},
            "simulated": (self.certify, "certify"),
            "precision": (self.estimator in STREAMED, f"estimators {', '.join(STREAMED)}"),
        }
        for name, (needed, what) in applies.items():
            if getattr(self, name) is not None and not needed:
                raise ValueError(f"{name} is for {what}, and would be ignored by {self.estimator!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings, for JSON."""
        return asdict(self)

    def build(
        self,
        model: nn.Module,
        valid: "Batch",
        *,
        guide: Program | None = None,
        seed: int = 0,
        device: str | None = None,
    ) -> Estimator:
        """The estimator; an over-dispersion is tuned on `valid`, and on `guide` where it is not the model's own."""
        proposal = self._proposal(model, valid, guide, seed, device)
        estimator = self._plain(proposal)
        if not self.certify:
            return estimator
        return sandwich(
            estimator,
            num_steps=self.steps or 1000,
            **self._chains(),
            proposal=proposal if self._chains()["start"] == "guide" else None,
            num_simulated=self.simulated or 100,
        )

    def _plain(self, proposal: Proposal | None) -> Estimator:
        particles = self.particles or PARTICLES.get(self.estimator, 0)
        if self.estimator == "exact":
            return exact()
        if self.estimator in STREAMED:
            options: dict[str, Any] = {"proposal": proposal, "precision": self.precision or "float32"}
            if self.estimator == "multilevel":
                return multilevel(particles, **options)
            return importance_sampling(particles, jackknife=self.estimator == "is-jackknife", **options)
        if self.estimator == REVERSED:
            return reverse_annealing(self.steps or 1000, self.chains or 16)
        if self.estimator == "router":
            chains = self._chains()
            last = annealed_importance_sampling(
                self.steps or 30, **chains, proposal=refined() if chains["start"] == "guide" else None
            )
            return router(particles, annealing=last)
        return annealed_importance_sampling(
            self.steps or 1000, **self._chains(), resample=self.estimator == "smc", proposal=proposal
        )

    def _chains(self) -> dict[str, Any]:
        """How annealing is done, but for its steps."""
        return {
            "num_chains": self.chains or 16,
            "num_leapfrog": self.leapfrog or 10,
            "start": "guide" if self.start is None else self.start,
        }

    def _proposal(
        self, model: nn.Module, valid: "Batch", guide: Program | None, seed: int, device: str | None
    ) -> Proposal | None:
        if self.proposal == "overdispersed":
            factor = DEFAULT_FACTOR if self.overdispersion is None else self.overdispersion
            if factor == TUNED:
                factor = tune_overdispersion(model, valid, guide=guide, seed=seed, device=device)
            return overdispersed(float(factor))
        if self.proposal == "defensive":
            return defensive()
        return refined() if self.proposal == "refined" else None
