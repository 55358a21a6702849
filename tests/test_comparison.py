import json
import math
from itertools import permutations

import numpy as np
import pytest

from pyro_vae.comparison import Comparison, combine, compare, flip
from pyro_vae.estimators.result import DIRECTIONS, LogLikelihood
from pyro_vae.spaces import Binary, Quantized, Real

Z95 = 1.959963984540054
ROW_KEYS = {
    "model",
    "estimator",
    "num_particles",
    "direction",
    "mean_log_prob",
    "mc_se",
    "test_se",
    "bits_per_dim",
    "seconds",
    "train_seconds",
    "frac_khat_above_0.7",
}
PAIR_KEYS = {"a", "b", "difference", "se", "low", "high"}


def result(log_prob, direction="exact", **changes) -> LogLikelihood:
    log_prob = np.asarray(log_prob, dtype=np.float64)
    fields = {
        "log_prob": log_prob,
        "variance": np.zeros(len(log_prob)),
        "direction": direction,
        "estimator": "exact" if direction == "exact" else "importance_sampling",
        "num_particles": 0 if direction == "exact" else 50,
        "space": Quantized((2, 2), 17),
        "digest": "ab" * 32,
        "seed": 0,
        "seconds": 2.5,
    }
    return LogLikelihood(**{**fields, **changes})


def two(direction_a="exact", direction_b="exact") -> Comparison:
    """a is above b by 0.5, -0.5, 2, 2: mean 1."""
    b, gain = np.array([-10.0, -20, -30, -40]), np.array([0.5, -0.5, 2, 2])
    return compare({"b": result(b, direction_b), "a": result(b + gain, direction_a)})


def test_pair_is_the_mean_and_standard_error_of_the_paired_differences() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(-100, 20, 37), rng.normal(-120, 20, 37)
    (pair,) = compare({"right": result(right), "left": result(left)}).pairs
    gain = left - right
    assert (pair.a, pair.b) == ("left", "right")
    assert pair.difference == pytest.approx(gain.mean(), abs=1e-12)
    assert pair.se == pytest.approx(np.sqrt(((gain - gain.mean()) ** 2).sum() / 36 / 37), rel=1e-12)
    assert (pair.low, pair.high) == pytest.approx((gain.mean() - Z95 * pair.se, gain.mean() + Z95 * pair.se))


def test_pair_by_hand() -> None:
    (pair,) = two().pairs
    assert (pair.a, pair.b, pair.difference) == ("a", "b", 1.0)
    assert pair.se == pytest.approx(math.sqrt((0.25 + 2.25 + 1 + 1) / 3 / 4), rel=1e-14)


def test_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """400 repeats: the 99.9% binomial band of a 95% interval is [.914, .986]."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        shared = rng.normal(-100, 30, 200)
        scores = {"a": result(shared + rng.normal(0.3, 2, 200)), "b": result(shared)}
        (pair,) = compare(scores).pairs
        sign = 1 if pair.a == "a" else -1
        covered += pair.low <= sign * 0.3 <= pair.high
    assert 0.914 <= covered / 400 <= 0.986


def test_pairing_removes_what_the_data_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(-100, 30, 500)
    comparison = compare({"a": result(shared + rng.normal(1, 1, 500)), "b": result(shared)})
    unpaired = math.hypot(*(row.result.test_se for row in comparison.rows))
    assert comparison.pairs[0].se < unpaired / 20  # sd 1 against 30 √2


def test_order_of_the_models_does_not_matter() -> None:
    scores = {"a": result([-1.0, -2]), "b": result([-3.0, -1]), "c": result([-1.0, -3]), "d": result([0.0, -1])}
    dicts = [compare(dict(order)).to_dict(data_name="x") for order in permutations(scores.items())]
    assert all(each == dicts[0] for each in dicts)
    assert [row["model"] for row in dicts[0]["rows"]] == ["d", "a", "b", "c"]  # b and c tie: by name
    assert len(dicts[0]["pairs"]) == 6
    assert all(pair["difference"] >= 0 for pair in dicts[0]["pairs"])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("exact", "exact", "exact"),
        ("lower", "exact", "lower"),
        ("exact", "upper", "lower"),
        ("lower", "upper", "lower"),
        ("exact", "lower", "upper"),
        ("upper", "exact", "upper"),
        ("upper", "lower", "upper"),
        ("lower", "lower", "unknown"),
        ("upper", "upper", "unknown"),
        ("unbiased", "exact", "unbiased"),
        ("exact", "unbiased", "unbiased"),
        ("unbiased", "unbiased", "unbiased"),
        ("unbiased", "lower", "unknown"),
        ("upper", "unbiased", "unknown"),
    ],
)
def test_direction_of_a_difference(a, b, expected) -> None:
    assert two(a, b).pairs[0].direction == expected


def test_direction_rule_agrees_with_interval_arithmetic() -> None:
    """Errors (estimate - truth) of a lower bound lie in [-1, 0], of an upper in [0, 1]; a sum adds the ends."""
    ends = {"exact": (0, 0), "lower": (-1, 0), "upper": (0, 1), "unbiased": (-1, 1)}
    for a in DIRECTIONS:
        assert ends[flip(a)] == (-ends[a][1], -ends[a][0])
        for b in DIRECTIONS:
            low, high = ends[a][0] + ends[b][0], ends[a][1] + ends[b][1]
            promised = {"lower": high <= 0, "upper": low >= 0, "exact": low == high == 0}
            direction = combine(a, b)
            assert promised.get(direction, low < 0 < high)
            assert combine(b, a) == direction


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"space": Binary((2, 2))}, ["space", "Quantized(17)", "Binary", "no common scale"]),
        ({"space": Quantized((4,), 17)}, ["space", "(2, 2)", "(4,)"]),
        ({"digest": "cd" * 32}, ["data", "ab" * 32, "cd" * 32, "SHA-256"]),
        ({"given": "label"}, ["quantity", "log p(x)", "log p(x | label)"]),
    ],
)
def test_refuses_unlike_results_and_names_both(changes, texts) -> None:
    scores = {"vae": result([-1.0, -2]), "same": result([-1.0, -2]), "gmm": result([-1.0, -2], **changes)}
    with pytest.raises(ValueError, match="cannot compare 'vae' with 'gmm'") as error:
        compare(scores)
    assert all(text in str(error.value) for text in texts)


def test_refuses_different_numbers_of_data() -> None:
    with pytest.raises(ValueError, match="number of data is 2 for 'vae', 3 for 'gmm'"):
        compare({"vae": result([-1.0, -2]), "gmm": result([-1.0, -2, -3])})


def test_refuses_what_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        compare({})
    with pytest.raises(TypeError, match=r"results\['vae'\] must be a LogLikelihood, got float"):
        compare({"vae": -1.0})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        compare({"vae": result([-1.0])}, level=95)


def test_json_has_the_promised_keys_and_reads_back(tmp_path) -> None:
    scores = {"a": result([-1.0, -2], "lower", khat=np.array([0.1, 0.9])), "b": result([-3.0, -5])}
    path = compare(scores, train_seconds={"a": 7.5}).to_json(tmp_path / "comparison.json", data_name="digits")
    contents = json.loads(path.read_text(encoding="utf-8"))
    assert set(contents) == {"data", "rows", "pairs", "remarks"}
    digest = "ab" * 32
    assert contents["data"] == {"name": "digits", "space": "Quantized(17)", "n_test": 2, "sha256": digest}
    first, second = contents["rows"]
    assert set(first) >= ROW_KEYS
    assert set(contents["pairs"][0]) >= PAIR_KEYS
    assert (first["mean_log_prob"], first["train_seconds"], first["frac_khat_above_0.7"]) == (-1.5, 7.5, 0.5)
    assert (second["train_seconds"], second["frac_khat_above_0.7"], second["num_particles"]) == (None, None, 0)


def test_json_of_one_datum_holds_null_and_no_nan(tmp_path) -> None:
    scores = {"a": result([-1.0], variance=np.array([np.inf])), "b": result([-3.0], "lower")}
    path = compare(scores).to_json(tmp_path / "comparison.json", data_name="digits")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert contents["rows"][0]["mc_se"] is None
    assert contents["rows"][0]["test_se"] is None
    pair = contents["pairs"][0]
    assert (pair["difference"], pair["se"], pair["low"], pair["high"]) == (2.0, None, None, None)


def test_other_quantities_stand_beside_and_are_not_paired() -> None:
    marginal = compare({"vae": result([-5.0, -6]), "cvae": result([-4.0, -6])})
    given = compare({"cvae": result([-3.0, -4], given="label", digest="cd" * 32)})
    contents = marginal.to_dict(data_name="digits", beside=[given])
    (beside,) = contents["beside"]
    assert (beside["quantity"], beside["sha256"], beside["pairs"]) == ("log p(x | label)", "cd" * 32, [])
    assert [row["mean_log_prob"] for row in beside["rows"]] == [-3.5]
    assert len(contents["rows"]) == 2
    assert len(contents["pairs"]) == 1


def test_table_shows_direction_errors_and_warnings() -> None:
    khat = np.array([0.9, 0.1, 0.1, 0.1])
    notes = ("a block was halved",)
    scores = {
        "vae": result([-1.0, -2, -3, -4], "lower", khat=khat, notes=notes, variance=np.full(4, 0.04)),
        "gmm": result([-2.0, -3, -4, -5.5]),
    }
    text = compare(scores, train_seconds={"vae": 7.25}).table()
    _, _, head, _, vae, gmm, *_ = text.splitlines()
    assert head.split()[:2] == ["model", "estimator"]
    cells = ["vae", "importance_sampling", "K=50", "≥", "-2.50", "0.100", "0.645", "≤", "0.902", "25.0%", "7.2", "2.5"]
    assert vae.split() == cells
    assert gmm.split() == ["gmm", "exact", "=", "-3.62", "0.000", "0.747", "=", "1.307", "—", "—", "2.5"]
    assert "Note: the Monte Carlo error of vae is not to be trusted for 25% of the data (k-hat > 0.41)" in text
    assert "Note on vae: a block was halved" in text
    assert "nats" in text
    assert "≥ at least this (lower bound)" in text


def test_five_per_cent_of_high_khat_are_not_remarked_upon() -> None:
    khat = np.full(20, 0.1)
    khat[0] = 0.9
    assert compare({"vae": result(np.zeros(20), "lower", khat=khat)}).remarks() == []


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("exact", "upper"), ("lower", "upper"), ("upper", "unknown"), ("unbiased", "unknown")],
)
def test_bits_of_dequantised_data_are_a_bound(direction, expected) -> None:
    (row,) = compare({"a": result([-1.0], direction, space=Real((2, 2), 256))}).rows
    assert row.bits_direction == expected
    (row,) = compare({"a": result([-1.0], direction, space=Binary((2, 2)))}).rows
    assert row.bits_direction == flip(direction)


def test_table_has_dashes_where_there_is_no_number() -> None:
    text = compare({"a": result([-1.0], space=Real((2, 2)))}).table()
    line = next(line for line in text.splitlines() if line.startswith("a "))
    assert line.split() == ["a", "exact", "=", "-1.00", "0.000", "—", "—", "—", "—", "2.5"]


def test_pairs_table_says_what_can_be_told_apart() -> None:
    base = np.linspace(-20, -10, 50)
    wave = np.tile([-1.0, 1], 25)
    above = {"a": result(base + 1 + wave), "b": result(base)}
    text = compare(above).pairs_table()
    assert "a above b" in text
    assert "= 1.000" in text
    assert "95% interval" in text
    apart = compare({"a": result(base + 0.1 + wave), "b": result(base)})
    assert "a and b cannot be told apart" in apart.pairs_table()
    bounds = compare({"a": result(base + 1 + wave, "lower"), "b": result(base, "lower")})
    assert "a above b, as estimated: the directions leave the true difference open" in bounds.pairs_table()
    higher = compare({"a": result(base + 1 + wave), "b": result(base, "lower")})
    assert "a above b, as estimated: the true difference may be smaller" in higher.pairs_table()


def test_pairs_table_of_one_model_or_one_datum() -> None:
    assert compare({"a": result([-1.0])}).pairs_table() == "One model, no pairs."
    assert "one datum gives no interval" in compare({"a": result([-1.0]), "b": result([-2.0])}).pairs_table()


def test_several_pairs_are_said_not_to_hold_at_once() -> None:
    scores = {name: result([-1.0 - i, -2]) for i, name in enumerate("abc")}
    assert "on its own, not all 3 at once" in compare(scores).pairs_table()
    assert "90% interval" in compare(scores, level=0.9).pairs_table()
