import csv
import dataclasses
import math

import numpy as np
import pytest

from pyro_vae.estimators.result import ARRAYS, Certificate, LogLikelihood
from pyro_vae.spaces import Binary, Quantized, Real


def result(log_prob, **changes) -> LogLikelihood:
    log_prob = np.asarray(log_prob, dtype=np.float64)
    fields = {
        "log_prob": log_prob,
        "variance": np.zeros(len(log_prob)),
        "direction": "exact",
        "estimator": "exact",
        "num_particles": 0,
        "space": Binary((2, 2)),
        "digest": "ab" * 32,
        "seed": 3,
        "seconds": 0.1 + 0.2,
    }
    return LogLikelihood(**{**fields, **changes})


def noisy(space, **changes) -> LogLikelihood:
    rng = np.random.default_rng(0)
    arrays = {
        "variance": rng.random(9),
        "ess": 100 * rng.random(9),
        "khat": np.append(rng.random(8), np.inf),
        "elbo": rng.normal(-1e3, 2, 9),
        "spread": rng.random(9),
        "bad": rng.random(9) < 0.5,
    }
    return result(rng.normal(-1e3, 1, 9), space=space, direction="lower", **arrays, **changes)


def assert_same(left: LogLikelihood, right: LogLikelihood) -> None:
    for field in dataclasses.fields(LogLikelihood):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in ARRAYS and a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        elif field.name == "marginal" and a is not None:
            assert_same(a, b)
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


@pytest.mark.parametrize(
    "space", [Binary((28, 28)), Quantized((3, 32, 32), 17), Real((8, 8)), Real((8, 8), 256)], ids=str
)
def test_save_and_load_give_back_every_digit(space, tmp_path) -> None:
    marginal = noisy(space, seed=4, notes=("over 10 labels",))
    certificate = Certificate(True, "for a reason", 0.1, 0.02, -3.1, -3.0, 0.2, 0.3, 50)
    checks = {"certificate": certificate, "shares": {"first": 0.25, "second": 0.75}, "khat_particles": 100}
    extras = {
        **checks,
        "bias_bound": 1 / 3,
        "doubling_bias": -1 / 3,
        "doubling_ratio": 0.7,
        "given": "label",
        "notes": ("one", "two"),
    }
    whole = noisy(space, **extras, marginal=marginal)
    whole.save(tmp_path / "result.npz")
    assert_same(whole, LogLikelihood.load(tmp_path / "result.npz"))


@pytest.mark.parametrize("name", ["result.npz", "result", "result.log_prob"])
def test_save_and_load_without_diagnostics_under_any_name(name, tmp_path) -> None:
    bare = result([-1.0, -2])
    bare.save(tmp_path / name)
    loaded = LogLikelihood.load(tmp_path / name)
    assert_same(bare, loaded)
    assert loaded.ess is None
    assert loaded.marginal is None


@pytest.mark.parametrize("full", [True, False])
def test_csv_reads_back_digit_for_digit(full, tmp_path) -> None:
    saved = noisy(Binary((2, 2))) if full else result(np.array([-1 / 3, -1e-300]))
    saved.to_csv(tmp_path / "result.csv")
    with open(tmp_path / "result.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["index", *(ARRAYS if full else ARRAYS[:2])]
    assert [int(row[0]) for row in rows] == list(range(len(saved)))
    for column, name in enumerate(head[1:], start=1):
        assert [float(row[column]) for row in rows] == getattr(saved, name).tolist()


def test_mean_and_errors_by_hand() -> None:
    """Mean -3; Σ s² = 0.01 + 0.04 + 0.04 = 0.3²; the sd of -5, -2, -2 is √((4 + 1 + 1)/2) = √3."""
    scored = result([-5.0, -2, -2], variance=np.array([0.01, 0.04, 0.04]))
    assert scored.mean == -3
    assert scored.mc_se == pytest.approx(0.3 / 3, rel=1e-14)
    assert scored.test_se == pytest.approx(math.sqrt(3) / math.sqrt(3), rel=1e-14)
    assert len(scored) == 3


def test_one_datum_has_no_test_error() -> None:
    scored = result([-5.0])
    assert math.isnan(scored.test_se)
    assert scored.summary()["test_se"] is None


def test_uniform_grey_levels_cost_eight_bits() -> None:
    shape, log_mass = (3, 4, 4), -48 * math.log(256)
    assert result([log_mass], space=Quantized(shape, 256)).bits_per_dim == pytest.approx(8, rel=1e-14)


def test_uniform_dequantised_density_costs_eight_bits() -> None:
    """A uniform density on [0, 1)^D has log p = 0 and stands for a uniform mass over 256 levels."""
    assert result([0.0], space=Real((3, 4, 4), 256)).bits_per_dim == 8


def test_fair_coins_cost_one_bit_and_real_numbers_none() -> None:
    assert result([-4 * math.log(2)]).bits_per_dim == pytest.approx(1, rel=1e-14)
    assert result([-1.0], space=Real((2, 2))).bits_per_dim is None


def test_quantity_and_share_of_high_khat() -> None:
    assert result([-1.0]).quantity == "log p(x)"
    assert result([-1.0], given="quadrants(1)").quantity == "log p(x | quadrants(1))"
    assert result([-1.0]).frac_khat_high is None
    assert result([-1.0] * 4, khat=np.array([0.7, 0.71, np.inf, -1])).frac_khat_high == 0.5


def test_refuses_an_unknown_direction() -> None:
    with pytest.raises(ValueError, match="direction must be one of exact, lower, upper, unbiased, got 'above'"):
        result([-1.0], direction="above")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_a_log_prob_that_is_not_finite_and_names_the_datum(bad) -> None:
    with pytest.raises(ValueError, match=rf"log_prob of datum 2 is {bad} \(1 such data\)"):
        result([-1.0, -2, bad])


@pytest.mark.parametrize("name", ["variance", "ess", "khat"])
def test_refuses_diagnostics_of_another_length(name) -> None:
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2,\), got \(3,\)"):
        result([-1.0, -2], **{name: np.zeros(3)})
