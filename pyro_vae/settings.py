"""Everything that decides the course of a fit by SVI, checked before it starts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

from pyro_vae.checks import check_choice, check_count, check_number
from pyro_vae.objectives import OBJECTIVES, OTHER_NAMES, SEVERAL

SCHEDULES = ("constant", "cosine", "one_cycle")
KL_SCHEDULES = ("linear", "cyclical")
AT_LEAST_1 = ("num_epochs", "batch_size", "num_particles", "validate_every", "num_cycles")
POSITIVE = ("learning_rate", "beta", "free_bits")
ONLY_WITH = {  # a setting, and the only choice that looks at it
    "alpha": ("objective", "renyi"),
    "free_bits": ("objective", "free_bits"),
    "num_cycles": ("kl_schedule", "cyclical"),
    "kl_warmup": ("kl_schedule", "linear"),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the course of an SVI fit; see `fit`."""

    num_epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    schedule: str = "one_cycle"
    adam_eps: float = 1e-4
    kl_warmup: int = 0
    objective: str = "elbo"
    num_particles: int = 1
    patience: int | None = None
    validate_every: int = 1
    seed: int = 0
    alpha: float = 0.5
    beta: float = 1.0
    kl_schedule: str = "linear"
    num_cycles: int = 4
    free_bits: float = 0.25
    compile: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", OTHER_NAMES.get(self.objective, self.objective))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("kl_schedule", self.kl_schedule, KL_SCHEDULES)
        check_choice("objective", self.objective, OBJECTIVES)
        if not (self.compile is None or isinstance(self.compile, bool)):
            raise ValueError(f"compile must be None, True or False, got {self.compile!r}")
        self._check_ranges()
        for each in fields(self):  # numpy's numbers are no numbers to torch
            value = getattr(self, each.name)
            if isinstance(value, Real) and not isinstance(value, bool):
                object.__setattr__(self, each.name, int(value) if isinstance(value, Integral) else float(value))
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name in AT_LEAST_1:
            check_count(name, getattr(self, name))
        for name in POSITIVE:
            check_number(name, getattr(self, name), above=0)
        check_count("kl_warmup", self.kl_warmup, least=0)
        check_count("seed", self.seed, least=0)
        if self.patience is not None:
            check_count("patience", self.patience)
        check_number("adam_eps", self.adam_eps)
        if self.adam_eps < 0:
            raise ValueError(f"adam_eps must not be negative, got {self.adam_eps}")
        check_number("alpha", self.alpha)
        if self.alpha == 1:
            raise ValueError("alpha must be a number other than 1, where the bound is the ELBO")

    def _check_combinations(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, (choice, needed) in ONLY_WITH.items():
            if getattr(self, name) != defaults[name] and getattr(self, choice) != needed:
                raise ValueError(f"{name} is for {choice} {needed!r}, got {choice} {getattr(self, choice)!r}")
        if self.objective in SEVERAL and self.num_particles < 2:
            raise ValueError(
                f"objective {self.objective!r} needs num_particles of at least 2, got {self.num_particles}: with one "
                "it is the ELBO"
            )
        if self.objective == "beta" and not self.weighs_latents:
            raise ValueError("objective 'beta' needs a beta other than 1, or a schedule of it, got beta 1: the ELBO")

    @property
    def weighs_latents(self) -> bool:
        """Whether log p(z) - log q(z | x) has a weight other than 1 at some step."""
        return self.beta != 1 or self.kl_warmup > 0 or self.kl_schedule == "cyclical"


def up_to_date(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint as they are called now; those that it does not know had what is now the default."""
    named = {**asdict(Settings()), **saved}
    return {**named, "objective": OTHER_NAMES.get(named["objective"], named["objective"])}
