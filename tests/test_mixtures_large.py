"""EM of many data: float32 against float64, stepwise EM against batch EM, data that are mapped from disk."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae import em, em_pass, k_means
from pyro_vae.grey_em import GreyLevels
from pyro_vae.mapped import Mapped
from pyro_vae.models.bernoulli_mixture import BernoulliMixture
from pyro_vae.models.gmm import GaussianMixture
from pyro_vae.spaces import Binary, Quantized, Real

Mixture = GaussianMixture | BernoulliMixture
NUM = 6000  # above the few that are fitted in float64 alone


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(num: int = NUM, narrow: float = 2e-3) -> Tensor:
    """Three kinds of images of 30 pixels, each of them `narrow` in 10 of them, far from the mean of all data."""
    source = generator(1)
    loc = torch.rand(3, 30, generator=source)
    scale = torch.full((3, 30), 0.2)
    for each in range(3):
        scale[each, each::3] = narrow
    kind = torch.randint(3, (num,), generator=source)
    return loc[kind] + scale[kind] * torch.randn(num, 30, generator=source)


def bits(num: int = NUM) -> Tensor:
    """Two kinds of images of 20 bits, hard to mistake."""
    source = generator(2)
    prob = torch.tensor([0.2, 0.8]).unsqueeze(-1).expand(2, 20)
    return prob[(torch.rand(num, generator=source) < 0.4).long()].bernoulli(generator=source)


def greys(num: int = NUM) -> Tensor:
    """Two kinds of images of 4 pixels in 8 grey levels."""
    source = generator(3)
    loc = torch.tensor([[1.0, 3.0, 5.0, 6.0], [5.0, 4.0, 1.0, 1.0]])
    kind = (torch.rand(num, generator=source) < 0.4).long()
    return (loc[kind] + torch.randn(num, 4, generator=source)).round().clamp(0, 7)


CASES = {
    "real": (lambda: GaussianMixture(Real((30,)), num_components=3), pixels),
    "grey": (lambda: GaussianMixture(Quantized((4,), levels=8), num_components=2), greys),
    "binary": (lambda: BernoulliMixture(Binary((20,)), num_components=2), bits),
}


def mean_log_prob(mixture: Mixture, obs: Tensor) -> float:
    """Exact but for the rounding of the parameters."""
    law = mixture.double().distribution()
    mixture.float()
    return law.log_prob(obs.double()).mean().item()


def parameters_of(fit: dict) -> Tensor:
    return torch.cat([value.flatten() for value in fit.values()])


def families(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the precision of every E step from here on."""
    steps: list[str] = []
    e_step = em.e_step

    def spy(family, rows, params, **options):
        steps.append(str(family.dtype).removeprefix("torch."))
        return e_step(family, rows, params, **options)

    monkeypatch.setattr(em, "e_step", spy)
    return steps


# --- two precisions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_mixed_precision_gives_the_likelihood_of_float64(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    obs = (pixels().double() + offset).to(torch.float64 if offset else torch.float32)
    traces = {}
    for precision in ("double", "mixed"):
        steps = families(monkeypatch)
        mixture = GaussianMixture(Real((30,)), num_components=3).double()
        traces[precision] = mixture.maximum_likelihood(obs, num_restarts=1, num_iterations=12, precision=precision)
        assert traces[precision][-1] == pytest.approx(mixture.distribution().log_prob(obs.double()).mean().item())
    assert steps.count("float32") > 2
    assert steps[-1] == "float64"
    assert traces["mixed"][-1] == pytest.approx(traces["double"][-1], abs=1e-4)  # 0.01 nat is asked for
    assert len(traces["mixed"]) == len(traces["double"])
    for here, there in zip(traces["mixed"], traces["double"], strict=True):
        assert here == pytest.approx(there, abs=2e-3)  # what float32 may be off by, in both of a pass and its start


def test_float32_is_not_used_where_it_loses_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    source = generator(4)
    centers = torch.tensor([[-1.0], [1.0]]).double().expand(2, 20)  # 10,000 standard deviations apart: no centre helps
    obs = centers[torch.randint(2, (NUM,), generator=source)]
    obs = obs + 1e-4 * torch.randn(NUM, 20, generator=source, dtype=torch.float64)
    steps = families(monkeypatch)
    mixture = GaussianMixture(Real((20,)), num_components=2, min_scale=1e-6).double()
    mixed = mixture.maximum_likelihood(obs, num_restarts=1, num_iterations=8)
    double = mixture.maximum_likelihood(obs, num_restarts=1, num_iterations=8, precision="double")
    assert steps.count("float32") <= 2  # the start is wide
    assert mixed[-1] == pytest.approx(double[-1], abs=1e-6)


def test_a_tolerance_below_the_error_of_float32_is_reached_in_float64() -> None:
    obs = pixels().double()
    mixture = GaussianMixture(Real((30,)), num_components=3).double()
    trace = mixture.maximum_likelihood(obs, num_restarts=1, num_iterations=500, tolerance=1e-13)
    mixture.distribution().log_prob(obs).mean().backward()
    scale = mixture.min_scale + mixture.log_scale.detach().exp()  # gradients in units of one standard deviation
    assert (mixture.loc.grad * scale).abs().max() < 1e-6
    assert all(after >= before - 1e-10 for before, after in itertools.pairwise(trace[-3:]))


def test_few_data_are_fitted_in_float64_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = families(monkeypatch)
    GaussianMixture(Real((30,)), num_components=3).maximum_likelihood(pixels(500), num_restarts=1)
    assert set(steps) == {"float64"}


def test_bits_in_float32_end_at_the_exact_objective() -> None:
    obs = bits()
    mixture = BernoulliMixture(Binary((20,)), num_components=2, pseudo_count=0.0).double()
    trace = mixture.maximum_likelihood(obs)
    assert trace[-1] == pytest.approx(mixture.distribution().log_prob(obs.double()).mean().item(), abs=1e-12)


# --- minibatches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_one_batch_of_all_data_with_steps_of_size_one_is_batch_em(case: str) -> None:
    build, data = CASES[case]
    obs, fits = data(), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = build().double()
    first.maximum_likelihood(obs, num_iterations=1, num_restarts=1)
    for options in ({}, {"batch_size": len(obs), "decay": 0}):
        mixture = build().double()
        mixture.load_state_dict(first.state_dict())
        trace = mixture.maximum_likelihood(
            obs, num_iterations=6, tolerance=-1.0, warm_start=True, **EXACT[case], **options
        )
        fits.append((trace, parameters_of(mixture.state_dict())))
    (batch, there), (stepwise, here) = fits
    assert stepwise == pytest.approx(batch, abs=1e-5 if case == "binary" else 1e-10)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4 if case == "binary" else 1e-8)


EXACT: dict[str, dict] = {"real": {"precision": "double"}, "grey": {}, "binary": {}}  # bits have no such choice


@pytest.mark.parametrize("case", CASES)
def test_stepwise_em_reaches_the_likelihood_of_batch_em(case: str) -> None:
    build, data = CASES[case]
    obs, found = data(), {}
    for name, options in (("batch", {}), ("stepwise", {"batch_size": 200, "decay": 0.7})):
        mixture = build()
        trace = mixture.maximum_likelihood(obs, num_restarts=1, num_iterations=12, tolerance=1e-5, **options)
        found[name] = mean_log_prob(mixture, obs)
        prior = trace[-1] - found[name]
        assert abs(prior) < (0.02 if case != "real" else 1e-4)  # the last entry is the objective of what came back
    assert found["stepwise"] == pytest.approx(found["batch"], abs=0.02)


def test_stepwise_em_is_seeded_and_leaves_the_global_random_state() -> None:
    obs, mixture = bits(), BernoulliMixture(Binary((20,)), num_components=2)
    state = torch.get_rng_state()
    options = {"batch_size": 500, "num_restarts": 2, "num_iterations": 6}
    traces = [mixture.maximum_likelihood(obs, seed=seed, **options) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert traces[0] == traces[1] != traces[2]


def test_a_warm_start_goes_on_from_the_parameters_that_are_there() -> None:
    obs, mixture = pixels().double(), GaussianMixture(Real((30,)), num_components=3).double()
    before = mixture.maximum_likelihood(obs, num_restarts=1, num_iterations=4)
    for options in ({}, {"batch_size": 100}):
        after = mixture.maximum_likelihood(obs, num_iterations=3, warm_start=True, **options)
        assert after[0] == pytest.approx(before[-1], abs=1e-3)  # the first pass may be in float32
        before = after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"batch_size": 10, "decay": 0.5},
            r"decay must be above 0.5 and at most 1 \(0 for .*, got 0.5",
        ),
        ({"batch_size": 10, "decay": 0}, "decay must be above 0.5"),
        ({"precision": "half"}, "precision must be one of mixed, double, got 'half'"),
    ],
)
def test_settings_that_make_no_sense_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(Real((30,)), num_components=2).maximum_likelihood(pixels(100), **options)


class Largest(TorchDispatchMode):
    """Looks at every tensor that is made, views apart: the most elements that one of them has."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in old:
                self.num_elements = max(self.num_elements, each.numel())
        return out


class Living(TorchDispatchMode):
    """Counts after every operation the bytes of all that was made inside and is still held by anyone: their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in [each.untyped_storage() for each in tree_leaves(out) if isinstance(each, Tensor)]:
            if storage._cdata not in old:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


# --- data larger than memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 256])
@pytest.mark.parametrize("case", CASES)
def test_mapped_data_are_read_block_by_block_to_the_same_fit(
    case: str, batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, data = CASES[case]
    obs = data()
    np.save(tmp_path / "obs.npy", obs.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "obs.npy", mmap_mode="c"))
    monkeypatch.setattr(GreyLevels, "block_rows", 1024)
    monkeypatch.setattr(em_pass, "BLOCK_SIZE", {"cpu": 1024 * obs.shape[1]})
    monkeypatch.setattr(k_means, "ROWS_PER_COMPONENT", 2)
    stored = Mapped(np.load(tmp_path / "obs.npy", mmap_mode="r"), range(len(obs)))
    traces = []
    for each in (obs, mapped, stored):
        with Largest() as made:
            traces.append(build().maximum_likelihood(each, num_restarts=1, num_iterations=3, batch_size=batch_size))
        block = em_pass.BLOCK_ROWS * obs.shape[1] if each is stored else 0  # which has no views: a block is read
        assert made.num_elements < max(obs.numel() / 2, block + 1)
    assert traces[0] == traces[1] == traces[2]


@pytest.mark.parametrize("case", CASES)
def test_stepwise_em_holds_the_statistics_of_one_batch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6000 data an epoch has 72 batches more than of 2400, each with at least K = 20 numbers per pixel."""
    build, data = CASES[case]
    obs = data(6000)
    monkeypatch.setattr(GreyLevels, "block_rows", 100)
    monkeypatch.setattr(em_pass, "BLOCK_SIZE", {"cpu": 100 * obs.shape[1]})
    monkeypatch.setattr(k_means, "ROWS_PER_COMPONENT", 2)
    peaks = []
    for rows in (obs[:2400], obs):
        mixture = type(build())(build().space, num_components=20)
        with Living() as living:
            mixture.maximum_likelihood(rows, num_restarts=1, num_iterations=2, batch_size=50)
        peaks.append(living.peak)
    assert peaks[0] > 50 * 20 * 8  # it does see the responsibilities of a batch
    assert peaks[1] - peaks[0] < 16 * 3600  # the index of each datum, and its order
