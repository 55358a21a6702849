"""Stochastic variational inference: one fit by one objective and one torch optimizer, its history, its checkpoint."""

import copy
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import checkpoint, distributed, schedules, traces
from pyro_vae.compiled import Gradients
from pyro_vae.data import Batch, Data
from pyro_vae.history import History, write_rows
from pyro_vae.mapped import Mapped
from pyro_vae.objectives import Objective, make_objective, particles_as_needed
from pyro_vae.parallel import SharedGradients
from pyro_vae.randomness import NOISE, SHUFFLE, VALIDATION, derived_seed, own_randomness, reseed
from pyro_vae.settings import Settings, up_to_date
from pyro_vae.traces import Pair

VALID_ROWS = 2000  # particles and data per block of the validation ELBO
FITTED = "_comes_out_of_a_fit"  # an attribute of a module, no part of its state
START_ROWS = 10_000  # of the data on disk that a model starts from
TOO_FEW = "the steps were too few to pay for a graph"
SAVE_SECONDS = 10.0  # a checkpoint at most this often, and always at the end


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message names the step and the site that went bad."""


class Run:
    """One SVI fit: its state, and what moves it on by a step or an epoch."""

    def __init__(self, pair: Pair, data: Data, settings: Settings, device: torch.device, out: Path | None) -> None:
        self.pair, self.settings, self.device, self.out = pair, settings, device, out
        self.data = _resident(data, device)
        self.module = nn.ModuleList(pair.modules).to(device)
        self.digests = {f"{name} data": getattr(data, name).digest[:12] for name in ("train", "valid")}
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the pair has no parameters to fit: model and guide must be torch modules that hold them")
        self.steps_per_epoch = -(-len(data.train) // settings.batch_size)
        schedules.check_cycles(settings, self.steps_per_epoch)
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate, eps=settings.adam_eps, fused=True)
        self.scheduler = schedules.learning_rate(self.optimizer, settings, settings.num_epochs * self.steps_per_epoch)
        self.generator = torch.Generator(device).manual_seed(derived_seed(settings.seed, SHUFFLE))
        self.epoch, self.step, self.seconds, self.saved = 0, 0, 0.0, time.perf_counter()
        self.rows: list[dict[str, float | None]] = []
        self.best: dict[str, Any] = {"epoch": 0, "valid_elbo": None, "model": None}
        self.boundary: dict[str, Any] = {}
        self.checks_every_loss = device.type == "cpu"  # elsewhere the device would be waited for at every step
        self.objective: Objective  # made where the fit starts or goes on, once model and guide are known to agree
        self.gradients: Gradients | SharedGradients

    def go(self, resume: bool, progress: bool, initialize: bool | None = None) -> History:
        """All epochs, whatever ends them, and the best parameters at the end.

        Args:
            resume: go on from the checkpoint.
            progress: show a bar.
            initialize: whether modules start from the data; those that were never fitted if None.
        """
        noise = own_randomness(derived_seed(self.settings.seed, NOISE), self.device)
        store = pyro.get_param_store().scope()  # of its own: there, modules of one class have one name
        with store, noise, _quiet_nan(), particles_as_needed(self.settings.objective, self.pair):
            self._load() if resume else self._start(initialize)
            try:
                status = self._epochs(progress)
            except KeyboardInterrupt:
                status = "interrupted"
            except NonFiniteLoss:
                self._finish("stopped")
                raise
            return self._finish(status)

    def _start(self, initialize: bool | None) -> None:
        for module in self.module:
            own: Any = getattr(module, "initialize", None)
            if own is not None and (not was_fitted(module) if initialize is None else initialize):
                own(_start_from(self.data.train, self.settings.seed).to(self.device))
        few = self._few()
        traces.matching_sites(self.pair, few)
        self._check_parameters(few)
        self._make_objective()
        self.objective.bound(self.pair, few)  # once under Pyro's checks; the loop goes without them
        self.boundary = self._snapshot()

    def _check_parameters(self, few: tuple[Tensor, ...]) -> None:
        """Refuse a pair that depends on parameters which no module of it holds: they would never move."""
        with own_randomness(0, self.device):
            hidden = traces.hidden_parameters(self.pair, few, self.parameters)
        if hidden:
            raise ValueError(
                f"the pair depends on parameters that its modules did not hold when the fit began, and that would stay "
                f"as they are: {', '.join(hidden)}; make model and guide torch modules that hold them, or, if they are "
                "to stay, call requires_grad_(False) on them"
            )

    def _few(self) -> tuple[Tensor, ...]:
        return tuple(arg[:2].to(self.device) for arg in self.data.valid.arguments)

    def _make_objective(self) -> None:
        """What is maximised, tried out on few data as in training: dropout in a guide leaves it without a density."""
        self.module.train()
        names = ("num_particles", "alpha", "free_bits")
        options = {name: getattr(self.settings, name) for name in names}
        self.objective = make_objective(self.settings.objective, self.pair, self._few(), **options)
        if distributed.size() > 1:
            how = self._few(), self.settings.compile
            self.gradients = SharedGradients(self.objective, self.pair, self.module, *how)
            return
        num_steps = (self.settings.num_epochs - self.epoch) * self.steps_per_epoch
        batch_size = min(self.settings.batch_size, len(self.data.train))
        self.gradients = Gradients(self.objective, self.pair, self.module, self.settings.compile, num_steps, batch_size)

    def _epochs(self, progress: bool) -> str:
        total, done = self.settings.num_epochs * len(self.data.train), self.epoch * len(self.data.train)
        with _bar(total, done, progress) as bar, pyro.validation_enabled(False):
            while self.epoch < self.settings.num_epochs:
                if self._stale():
                    return "early stop"
                started = time.perf_counter()
                train_elbo = self._train_epoch(bar)
                self.epoch += 1
                self._record(train_elbo, started)
                self.boundary = self._snapshot()
                if self.out is not None and time.perf_counter() - self.saved > SAVE_SECONDS:
                    self._save(self.out)
                self._show(bar)
        return "finished"

    def _train_epoch(self, bar: Any) -> float:
        """One pass over a permutation of the training data; the mean ELBO, nats per datum."""
        if distributed.size() > 1:  # permutation and bits are the same in every process, the noise is not
            reseed(derived_seed(self.settings.seed, NOISE, self.epoch, distributed.rank()), self.device)
        batch = self.data.epoch(self.generator)
        order = torch.randperm(len(batch), generator=self.generator, device=self.device)
        self.module.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in order.split(self.settings.batch_size):
            with distributed.part_of(index) as mine:
                total += self._train_step(self._rows(batch, mine)) * len(index)
            bar.update(len(index))
        if not (self.checks_every_loss or math.isfinite(total)):
            return self._epoch_again()
        return -float(total) / len(batch)

    def _epoch_again(self) -> float:
        """The epoch from its start, looking at every loss, so that the first bad one is named: after a bad sum."""
        self._go_back_to(self.boundary)
        self.checks_every_loss = True
        with _bar(0, 0, False) as hidden:
            return self._train_epoch(hidden)

    def _rows(self, batch: Batch, index: Tensor) -> tuple[Tensor, ...]:
        """Some rows of a batch, on the device; the batch itself may have been too large for it."""
        return tuple(arg[index.to(arg.device)].to(self.device) for arg in batch.arguments)

    def _train_step(self, args: tuple[Tensor, ...]) -> Tensor:
        self.step += 1
        loss = self.gradients(args, self._kl_weight(self.step))
        if self.checks_every_loss and not bool(loss.isfinite()):
            raise NonFiniteLoss(self._complaint(float(loss), args))
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def _complaint(self, loss: float, args: tuple[Tensor, ...]) -> str:
        site = traces.nonfinite_site(self.pair, args) or "no single site (their sum overflowed)"
        if distributed.size() > 1:
            site += f", by the data of process {distributed.rank()}"
        where = f"step {self.step} (epoch {self.epoch + 1})"
        return f"loss is {loss} at {where}; not finite: {site}; a smaller learning_rate may help"

    def _kl_weight(self, step: int) -> float:
        return schedules.kl_weight(self.settings, step, self.steps_per_epoch)

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean validation bound of the objective, nats per datum, always with the same noise; NaN raises."""
        self.module.eval()
        total, block = 0.0, max(1, VALID_ROWS // self.settings.num_particles)
        with own_randomness(derived_seed(self.settings.seed, VALIDATION), self.device):
            for index, start in enumerate(range(0, len(self.data.valid), block)):
                if not distributed.takes(index):
                    continue
                if distributed.size() > 1:  # one stream of noise cannot be shared
                    reseed(derived_seed(self.settings.seed, VALIDATION, index), self.device)
                rows = tuple(arg[start : start + block].to(self.device) for arg in self.data.valid.arguments)
                total += self.objective.bound(self.pair, rows)
                if math.isnan(total):
                    site = traces.nonfinite_site(self.pair, rows) or "no single site"
                    where = f"after step {self.step} (epoch {self.epoch})"
                    raise NonFiniteLoss(f"validation ELBO is nan {where}; not finite: {site}")
        return distributed.total(total) / len(self.data.valid)

    def _record(self, train_elbo: float, started: float) -> None:
        """A row of the history; a loss with a KL weight other than 1, or with free bits, is no ELBO and is left out."""
        valid_elbo = None
        steps = range(self.step - self.steps_per_epoch + 1, self.step + 1)
        is_bound = self.objective.is_bound and all(self._kl_weight(step) == 1 for step in steps)
        if self.epoch % self.settings.validate_every == 0 or self.epoch == self.settings.num_epochs:
            valid_elbo = self._validate()
            if self.best["valid_elbo"] is None or valid_elbo > self.best["valid_elbo"]:
                state = copy.deepcopy(self.module.state_dict())
                self.best = {"epoch": self.epoch, "valid_elbo": valid_elbo, "model": state}
        self.seconds += time.perf_counter() - started
        self.rows.append(
            {
                "epoch": self.epoch,
                "train_elbo": train_elbo if is_bound else None,
                "valid_elbo": valid_elbo,
                "kl_weight": self._kl_weight(self.step),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "seconds": self.seconds,
            }
        )

    def _show(self, bar: Any) -> None:
        bounds = {"train": self.rows[-1]["train_elbo"], "best valid": self.best["valid_elbo"]}  # log p without latents
        bar.set_postfix_str(", ".join(f"{k} {v:.2f} nats" for k, v in bounds.items() if v is not None), refresh=False)

    def _stale(self) -> bool:
        """Whether an epoch that was validated is `patience` or more epochs past the best one."""
        patience = self.settings.patience
        if patience is None or not self.rows or self.rows[-1]["valid_elbo"] is None:
            return False
        return self.epoch - self.best["epoch"] >= patience

    def _finish(self, status: str) -> History:
        """Save the last whole epoch, and leave the model with its best parameters."""
        if self.out is not None:
            self._save(self.out)
        if status not in ("interrupted", "stopped"):  # else the others may be elsewhere
            distributed.wait()
        if self.best["model"] is not None:
            self.module.load_state_dict(self.best["model"])
        if self.step > 0:
            for module in self.module:
                mark_fitted(module)
        self.module.eval()
        way = self.gradients.ran_as, self.gradients.reason
        if way == ("eager", ""):
            way = "eager", TOO_FEW
        return History(tuple(self.rows), self.best["epoch"], self.best["valid_elbo"], status, self.seconds, *way)

    def _snapshot(self) -> dict[str, Any]:
        """All that the next epoch depends on, as it is between two epochs."""
        state = {
            "last": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        so_far = {"best": self.best, "rows": list(self.rows), "seconds": self.seconds}  # replaced, never changed
        return {**copy.deepcopy(state), **so_far}

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, for a run to go on from it."""
        return {**asdict(self.settings), **self.digests, "processes": distributed.size()}

    def _save(self, out: Path) -> None:
        if not distributed.is_first():
            return
        best = self.best["model"] or self.boundary["last"]
        parts = {name: on_cpu(_part(best, i)) for i, name in enumerate(("model", "guide"))}
        checkpoint.save(out / "checkpoint.pt", {**parts, "settings": self._identity(), **self.boundary})
        write_rows(self.boundary["rows"], out / "history.csv")
        self.saved = time.perf_counter()

    def _load(self) -> None:
        if self.out is None:
            raise ValueError("resume needs the directory of the run in `out`")
        state = checkpoint.load(self.out / "checkpoint.pt")
        saved = {"processes": 1, **up_to_date(state.get("settings", {}))}
        _check_same_settings(saved, self._identity(), self.out)
        self.best, self.rows, self.seconds = state["best"], state["rows"], state["seconds"]
        self._go_back_to(state)
        self._make_objective()
        self._go_back_to(state)  # to make it has moved the noise
        self.boundary = self._snapshot()

    def _go_back_to(self, state: dict[str, Any]) -> None:
        """Parameters, optimizer, noise and place in the course of the fit, as a snapshot has them."""
        self.module.load_state_dict(state["last"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def _start_from(train: Batch, seed: int) -> Tensor:
    """The training data; of those on disk a random part, in memory."""
    return train.subset(min(len(train), START_ROWS), seed).obs if isinstance(train.obs, Mapped) else train.obs


def _resident(data: Data, device: torch.device) -> Data:
    """Training and validation data on the device, or, where they do not fit, as they are; never the test data."""
    mine = replace(data, test=data.valid)
    try:
        return mine.to(device)
    except torch.OutOfMemoryError:
        return mine


def _part(state: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The state of one module of the pair, under the names that the module itself gives."""
    prefix = f"{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def was_fitted(module: nn.Module) -> bool:
    """Whether a module comes out of a fit, in this process or by way of a run on disk; copies do as it does."""
    return bool(getattr(module, FITTED, False))


def mark_fitted(module: nn.Module) -> None:
    """Note that a module comes out of a fit: the next one goes on from its parameters."""
    setattr(module, FITTED, True)


def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with all tensors on the CPU."""
    return {name: value.cpu() for name, value in state.items()}


def _check_same_settings(saved: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    other = [f"{name} was {saved.get(name)}, now {asked[name]}" for name in asked if saved.get(name) != asked[name]]
    if other:
        raise ValueError(f"cannot resume {out}: {'; '.join(other)}")


@contextmanager
def _bar(total: int, done: int, show: bool) -> Iterator[Any]:
    from tqdm import tqdm

    hidden = not (show and distributed.is_first())
    with tqdm(total=total, initial=done, unit="img", unit_scale=True, disable=hidden, mininterval=1.0) as bar:
        yield bar


@contextmanager
def _quiet_nan() -> Iterator[None]:
    """Pyro warns of a NaN loss; `fit` raises instead, with the step and the site."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered N")
        yield
