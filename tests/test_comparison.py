import dataclasses
import json
import math
import re
from itertools import permutations

import numpy as np
import pytest

from pyro_vae.comparison import Comparison, compare
from pyro_vae.estimators.result import DIRECTIONS, Certificate, LogLikelihood
from pyro_vae.rows import combine, flip
from pyro_vae.spaces import Binary, Quantized, Real

T95_36 = 2.0280940009804502  # 97.5% quantile of t(36)
T95_3 = 3.182446305284263  # of t(3)
BAND_400 = (0.914, 0.986)  # 99.9% binomial band of a 95% interval in 400 repeats
FALSE_400 = 35  # at most so many of 400 in 99.9% of all cases, where the probability of each is 5%
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
    "interval_low",
    "interval_high",
    "bias_bound",
    "warning",
}
PAIR_KEYS = {"a", "b", "difference", "se", "low", "high", "pointwise_low", "pointwise_high", "mc_se", "direction"}


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


def trusted(log_prob, direction="lower", bias_bound=0.0, **changes) -> LogLikelihood:
    """An estimate against which no diagnostic speaks."""
    khat = np.full(len(log_prob), -1.0)
    return result(log_prob, direction, khat=khat, bias_bound=bias_bound, num_particles=5000, **changes)


def two(direction_a="exact", direction_b="exact") -> Comparison:
    """a is above b by 0.5, -0.5, 2, 2: mean 1."""
    b, gain = np.array([-10.0, -20, -30, -40]), np.array([0.5, -0.5, 2, 2])
    return compare({"b": result(b, direction_b), "a": result(b + gain, direction_a)})


def waves(shift: float, num_data: int = 50, seed: int = 0) -> np.ndarray:
    """`shift` and ±1 in turn, on a shared base: the mean difference to `waves(0)` less the ±1 is `shift` exactly."""
    base = np.linspace(-20, -10, num_data)
    return base + shift + (np.tile([-1.0, 1], num_data // 2) if shift else 0)


def test_pair_is_the_mean_and_standard_error_of_the_paired_differences() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(-100, 20, 37), rng.normal(-120, 20, 37)
    (pair,) = compare({"right": result(right), "left": result(left)}).pairs
    gain = left - right
    assert (pair.a, pair.b) == ("left", "right")
    assert pair.difference == pytest.approx(gain.mean(), abs=1e-12)
    assert pair.se == pytest.approx(np.sqrt(((gain - gain.mean()) ** 2).sum() / 36 / 37), rel=1e-12)
    assert (pair.low, pair.high) == pytest.approx((gain.mean() - T95_36 * pair.se, gain.mean() + T95_36 * pair.se))
    assert (pair.pointwise_low, pair.pointwise_high) == (pair.low, pair.high)  # one pair: nothing to hold at once


def test_pair_by_hand() -> None:
    (pair,) = two().pairs
    assert (pair.a, pair.b, pair.difference) == ("a", "b", 1.0)
    assert pair.se == pytest.approx(math.sqrt((0.25 + 2.25 + 1 + 1) / 3 / 4), rel=1e-14)


def test_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """With t quantiles for 8 data as for 200."""
    for num_data in (8, 200):
        rng, covered = np.random.default_rng(1), 0
        for _ in range(400):
            shared = rng.normal(-100, 30, num_data)
            scores = {"a": result(shared + rng.normal(0.3, 2, num_data)), "b": result(shared)}
            (pair,) = compare(scores).pairs
            sign = 1 if pair.a == "a" else -1
            covered += pair.low <= sign * 0.3 <= pair.high
        assert BAND_400[0] <= covered / 400 <= BAND_400[1]


def test_monte_carlo_error_of_a_difference_is_that_of_both() -> None:
    scores = {
        "a": trusted([-1.0, -2], variance=np.array([0.5, 0.4])),
        "b": trusted([-3.0, -5], variance=np.full(2, 0.35)),
    }
    assert compare(scores).pairs[0].mc_se == pytest.approx(math.sqrt(0.9 + 0.7) / 2)


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
        ({"space": Binary((2, 2))}, ["space", "Quantized(17)", "Binary", "masses over other values"]),
        ({"space": Real((2, 2))}, ["space", "Quantized(17)", "Real", "a mass and a density have no common scale"]),
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
    assert set(contents) == {"data", "level", "rows", "pairs", "remarks", "sentences"}
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
        "vae": result([-1.0, -2, -3, -4], "lower", khat=khat, notes=notes, variance=np.full(4, 0.04), bias_bound=0.25),
        "gmm": result([-2.0, -3, -4, -5.5]),
    }
    text = compare(scores, train_seconds={"vae": 7.25}).table()
    _, _, head, _, vae, gmm, *_ = text.splitlines()
    assert head.split()[:2] == ["model", "estimator"]
    assert head.count("95% interval") == head.count("fit s") == 1
    half = T95_3 * math.sqrt(5 / 3 / 4)
    interval = [f"[{-2.5 - half:.2f},", f"{-2.5 + 0.25 + half:.2f}]?"]
    cells = ["vae", "IS", "K=50", "≥", "-2.50", *interval, "0.100", "0.645", "≤", "0.902", "25.0%", "7.2", "2.5"]
    assert vae.split() == cells
    assert gmm.split()[:4] == ["gmm", "exact", "=", "-3.62"]
    assert gmm.split()[6:] == ["0.000", "0.747", "=", "1.307", "—", "—", "2.5"]
    assert "Note: vae: the Monte Carlo error is not to be trusted for" in text
    assert "Note on vae: a block was halved" in text
    assert "nats" in text
    assert "≥ at least this (lower bound)" in text
    assert "IS importance sampling" in text


def test_table_mentions_stages_and_certificate() -> None:
    check = Certificate(False, "real data are harder", 0.125, 0.015, -80.0, -79.875, 9.0, 3.0, 100)
    shares = {"importance_sampling": 0.62, "refined": 0.3, "annealed": 0.08}
    routed = trusted([-1.0, -2], estimator="router", shares=shares, certificate=check)
    remarks = compare({"vae": routed}).remarks()
    assert remarks == [
        "Note: vae: no certificate: real data are harder",
        "Note on vae: router: 62% importance sampling, 30% refined, 8% annealed",
        "Note on vae: certificate withheld, gap 0.125 ± 0.015 nats",
    ]
    granted = dataclasses.replace(routed, certificate=dataclasses.replace(check, granted=True, reason="no harder"))
    assert compare({"vae": granted}).remarks()[1:] == [
        "Note on vae: certificate granted, gap 0.125 ± 0.015 nats: no harder"
    ]


def test_a_result_without_warning_is_not_remarked_upon() -> None:
    assert compare({"vae": trusted(np.zeros(20), bias_bound=0.1)}).remarks() == []


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
    assert line.split() == ["a", "exact", "=", "-1.00", "—", "0.000", "—", "—", "—", "2.5"]
    assert "fit s" not in text  # of no model


# bias


@pytest.mark.parametrize(
    ("a", "b", "below", "above"),
    [
        ("exact", "exact", 0.0, 0.0),
        ("lower", "exact", 0.0, 0.3),
        ("exact", "lower", 0.1, 0.0),
        ("lower", "lower", 0.1, 0.3),
        ("unbiased", "unbiased", 0.1, 0.3),
        ("upper", "exact", 0.3, 0.0),
        ("upper", "upper", 0.3, 0.1),
        ("upper", "lower", 0.3 + 0.1, 0.0),
    ],
)
def test_bias_bounds_widen_the_interval_on_their_side(a, b, below, above) -> None:
    """The truth of a lower bound lies up to B above its mean, that of an upper bound below; b counts the other way."""
    bounds = {name: 0.0 if direction == "exact" else bound for name, direction, bound in (("a", a, 0.3), ("b", b, 0.1))}
    gain = waves(5.0)
    scores = {"a": trusted(gain, a, bounds["a"]), "b": trusted(waves(0), b, bounds["b"])}
    (pair,) = compare(scores).pairs
    half = pair.error.half_width(0.95)
    assert (pair.a, pair.difference) == ("a", pytest.approx(5))
    assert (pair.low, pair.high) == pytest.approx((5 - below - half, 5 + above + half))
    assert (pair.bias_low, pair.bias_high) == pytest.approx((below, above))


@pytest.mark.parametrize(
    ("direction", "ends"), [("lower", (0.0, 0.3)), ("upper", (0.3, 0.0)), ("unbiased", (0.0, 0.3))]
)
def test_interval_of_a_row_holds_its_bias_on_the_side_of_its_direction(direction, ends) -> None:
    (row,) = compare({"a": trusted(waves(1), direction, 0.3)}).rows
    half = row.error.half_width(0.95)
    assert (row.interval.low, row.interval.high) == pytest.approx(
        (row.mean - ends[0] - half, row.mean + ends[1] + half)
    )


def test_interval_of_two_biased_estimates_covers_the_true_difference() -> None:
    """Both are too low by up to their bound, one by all of it: coverage is at least that of the band's lower end."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        truth_a, truth_b = rng.normal(-100, 1, 100), rng.normal(-100, 1, 100)
        scores = {"a": trusted(truth_a - 0.3, "lower", 0.3), "b": trusted(truth_b, "lower", 0.3)}
        (pair,) = compare(scores).pairs
        covered += pair.low <= 0 <= pair.high
    assert covered / 400 >= BAND_400[0]


# verdicts


def verdict(a: LogLikelihood, b: LogLikelihood) -> str:
    return compare({"a": a, "b": b}).pairs[0].verdict


def test_verdict_of_trusted_results() -> None:
    assert verdict(result(waves(1)), result(waves(0))) == "a above b"
    assert verdict(trusted(waves(1)), trusted(waves(0), bias_bound=0.2)) == "a above b"
    assert verdict(result(waves(0.1)), result(waves(0))) == "a and b cannot be told apart"
    assert verdict(trusted(waves(1)), trusted(waves(0), bias_bound=0.8)) == "a and b cannot be told apart"


def test_verdict_with_a_warning_is_as_estimated_and_says_why() -> None:
    unknown = "no bound on the bias of the mean is known"
    below = trusted(waves(0), bias_bound=None)
    assert verdict(result(waves(1)), below) == f"as estimated: a above b; b: {unknown}"
    assert verdict(result(waves(0.1)), below) == f"as estimated: a and b cannot be told apart; b: {unknown}"
    (pair,) = compare({"a": result(waves(1)), "b": below}).pairs
    assert pair.warning == f"b: {unknown}"
    assert pair.low > 0  # shown all the same


def test_a_lower_bound_that_lies_above_does_so_whatever_its_warning() -> None:
    """The truth of a is at least its estimate, and b is exact: a warning touches the upper end alone."""
    text = verdict(trusted(waves(1), bias_bound=None), result(waves(0)))
    assert text == "a above b; by how much is as estimated; a: no bound on the bias of the mean is known"
    assert compare({"a": trusted(waves(1), bias_bound=None), "b": result(waves(0))}).pairs[0].is_sure
    assert not compare({"a": trusted(waves(1), "unbiased", None), "b": result(waves(0))}).pairs[0].is_sure


def test_pairs_table_says_what_can_be_told_apart() -> None:
    text = compare({"x": result(waves(1)), "y": result(waves(0))}).pairs_table()
    line = next(line for line in text.splitlines() if line.startswith("x  y"))
    assert line.endswith("a above b")
    assert "= 1.000" in line
    assert "95% interval" in text
    assert "Can be told apart: x above y." in text
    assert "The interval covers at 95% over draws of test sets." in text


def test_pairs_table_of_one_model_or_one_datum() -> None:
    assert compare({"a": result([-1.0])}).pairs_table() == "One model, no pairs."
    assert "one datum gives no interval" in compare({"a": result([-1.0]), "b": result([-2.0])}).pairs_table()
    assert compare({"a": result([-1.0]), "b": result([-2.0])}).sentences() == []


def test_report_is_both_tables() -> None:
    comparison = compare({"a": result(waves(1)), "b": result(waves(0))})
    assert comparison.report() == f"{comparison.table()}\n\n{comparison.pairs_table()}"
    alone = compare({"a": result(waves(1))})
    assert alone.report() == alone.table()


def test_skewed_differences_are_remarked_upon() -> None:
    """A single datum out of 50 makes all of the difference: skewness (n-2)/√(n-1) = 6.86, and 25 γ² = 1175 > 50."""
    gain = np.zeros(50)
    gain[0] = 5
    text = compare({"a": result(waves(0) + gain), "b": result(waves(0))}).pairs_table()
    assert "Note: skewed or heavy-tailed differences, |γ| up to 6.9 (50 test data" in text
    assert "skewed" not in compare({"a": result(waves(1)), "b": result(waves(0))}).pairs_table()


# what it would take


def wanted(a: LogLikelihood, b: LogLikelihood) -> str | None:
    return compare({"a": a, "b": b}).pairs[0].wanted()


def number_in(text: str | None) -> float:
    assert text is not None
    return float(text.split()[1].replace(",", ""))


def test_so_many_data_tell_the_difference() -> None:
    """With that many data of the same kind the lower end comes to lie about 0; two digits are given, rounded up."""
    text = wanted(result(waves(0.1)), result(waves(0)))
    assert text is not None
    assert text.endswith("test data (now 50)")
    num_data = 2 * round(number_in(text) / 2)
    (pair,) = compare({"a": result(waves(0.1, num_data)), "b": result(waves(0, num_data))}).pairs
    assert abs(pair.low) < 0.1 * pair.difference
    assert wanted(result(waves(1)), result(waves(0))) is None


def test_so_many_particles_tell_the_difference() -> None:
    """All of the variance is Monte Carlo noise: it must fall by (half width / difference)²."""
    a = trusted(waves(0.1), variance=np.ones(50))
    (pair,) = compare({"a": a, "b": result(waves(0))}).pairs
    text = pair.wanted()
    assert text is not None
    assert text.endswith("times as many particles")
    sampling = pair.se**2 - pair.mc_se**2  # what is left with endless particles
    times = number_in(text)
    left = math.sqrt(sampling + pair.mc_se**2 / times) / pair.se * pair.error.half_width(0.95)
    assert left == pytest.approx(pair.difference, rel=0.05)


def test_bias_asks_for_a_tighter_estimate_and_not_for_data() -> None:
    b = trusted(waves(0), bias_bound=2.0)
    text = wanted(result(waves(1)), b)
    assert text == "the bias may be 2 nats: a tighter estimate (particles, annealing); more test data will not help"
    text = wanted(result(waves(1)), trusted(waves(0), bias_bound=0.9))
    assert text == "the bias may be 0.9 nats: a tighter estimate (particles, annealing); nothing else is in the way"


def test_equal_estimates_and_infinite_variance_have_their_words() -> None:
    assert wanted(result(waves(0)), result(waves(0))) == "nothing, the estimates are equal"
    text = wanted(trusted(waves(0.1), variance=np.full(50, np.inf)), result(waves(0)))
    assert text is not None
    assert "test data" in text


def test_sentences_of_three_models() -> None:
    scores = {"a": result(waves(1.0)), "b": result(waves(0) + 0.9), "c": trusted(waves(0), "lower", None)}
    told, as_estimated, *rest = compare(scores).sentences()
    assert re.fullmatch(r"- a and b: about [\d,]+ test data \(now 50\)\.", rest[0])
    assert told == "Only as estimated: a above c; b above c."
    assert as_estimated.startswith("Cannot be told apart (what it would take")
    assert rest == [
        rest[0],
        "As estimated, since: c: no bound on the bias of the mean is known.",
        "All 3 intervals hold at once at 95% over draws of test sets (Bonferroni).",
        "One fit of each model: what is said is about the model that it gave, not about the method.",
    ]


# all at once


def test_all_intervals_hold_at_once_and_the_text_says_so() -> None:
    rng = np.random.default_rng(4)
    scores = {name: result(rng.normal(size=200)) for name in "abc"}
    comparison = compare(scores, level=0.9)
    assert "All 3 intervals hold at once at 90% over draws of test sets (max-T" in comparison.pairs_table()
    assert "90% interval" in comparison.pairs_table()
    for pair in comparison.pairs:
        assert pair.low < pair.pointwise_low < pair.pointwise_high < pair.high


def false_claims(draw, num_models: int = 6, num_repeats: int = 400, groups=None) -> int:
    """Comparisons among equal models in which some two are told apart."""
    rng, count = np.random.default_rng(5), 0
    for _ in range(num_repeats):
        shared = rng.normal(-100, 30, 200)
        scores = draw(rng, (200, num_models))
        models = {str(i): result(shared + scores[:, i]) for i in range(num_models)}
        count += any(pair.told_apart for pair in compare(models, groups=groups).pairs)
    return count


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: rng.normal(size=shape),
        lambda rng, shape: rng.standard_t(3, size=shape),
        lambda rng, shape: rng.normal(size=shape) * [0.1, 1, 1, 2, 5, 20],
    ],
    ids=["normal", "heavy tails", "unequal variances"],
)
def test_equal_models_are_told_apart_in_one_comparison_of_twenty_at_most(draw) -> None:
    """Of 15 pairs; intervals that each hold on their own would tell some two apart in about a third of all cases."""
    assert false_claims(draw) <= FALSE_400


def test_some_equal_models_are_told_apart_so_that_the_intervals_are_not_too_wide() -> None:
    """The other end of the band: a probability of 5% gives at least 8 of 400 in 99.9% of all cases."""
    assert false_claims(lambda rng, shape: rng.normal(size=shape)) >= 8


# clusters


def test_few_clusters_do_not_tell_equal_models_apart_more_often() -> None:
    def draw(rng, shape):
        return rng.normal(size=(10, shape[1])).repeat(20, axis=0) + rng.normal(size=shape)

    groups = np.arange(200) // 20
    assert false_claims(draw, 3, 200, groups) <= 21  # of 200 at 5%, in 99.9% of all cases
    assert false_claims(draw, 3, 50) > 21  # and what ignoring them does, of 50


def test_clusters_enter_every_error_and_are_named() -> None:
    rng = np.random.default_rng(6)
    labels = [f"video {i // 10}" for i in range(400)]
    effects = rng.normal(size=(2, 40)).repeat(10, axis=1)
    scores = {name: result(effects[i] + rng.normal(size=400)) for i, name in enumerate("ab")}
    plain, clustered = compare(scores), compare(scores, groups=labels)
    assert clustered.num_clusters == 40
    assert clustered.pairs[0].se > 2 * plain.pairs[0].se  # the design effect is 1 + 9/2
    assert clustered.rows[0].test_se > 2 * plain.rows[0].test_se
    assert clustered.pairs[0].error.parts[0][1] == 39  # degrees of freedom
    assert "400 data in 40 clusters" in clustered.table()
    assert "400 data in 40 clusters" in clustered.pairs_table()
    assert "over draws of clusters of the test set" in clustered.pairs_table()
    contents = clustered.to_dict(data_name="videos")
    assert contents["data"]["num_clusters"] == 40  # type: ignore[index]
    assert clustered.remarks() == []


def test_few_clusters_are_remarked_upon() -> None:
    scores = {"a": result(np.arange(40.0))}
    assert "Note: 10 clusters: errors" in compare(scores, groups=np.arange(40) // 4).table()
    one_large = np.minimum(np.arange(40), 20)  # 20 single data and 20 together: 40²/(20 + 20²) = 3.8
    assert "Note: 21 clusters, worth 4 of one size" in compare(scores, groups=one_large).table()


def test_groups_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"groups must have shape \(2,\)"):
        compare({"a": result([-1.0, -2])}, groups=[0, 1, 2])


# several fits


def test_row_of_several_fits_is_their_mean_and_says_so() -> None:
    fits = [trusted([-1.0, -3], seed=i, bias_bound=b) for i, b in enumerate((0.1, 0.3))]
    fits.append(trusted([-2.0, -6], seed=2, bias_bound=0.2))
    comparison = compare({"vae": fits, "gmm": result([-9.0, -10])}, train_seconds={"vae": 30.0})
    row = comparison.rows[0]
    assert row.mean == pytest.approx((-2 - 2 - 4) / 3)
    assert row.fit_sd == pytest.approx(np.std([-2, -2, -4], ddof=1))
    assert row.error.of_fits == pytest.approx(np.std([-2, -2, -4], ddof=1) / math.sqrt(3))
    assert row.bias_bound == pytest.approx(0.2)
    assert row.seconds == 7.5
    table = comparison.table()
    assert "3 fits" in table
    assert "1.155" in table  # sd over fits
    assert "of 3 fits 2 are different" in table
    assert "3 fits of vae: a claim about a method needs at least 5." in comparison.sentences()
    assert any(text.startswith("One fit of gmm:") for text in comparison.sentences())


def test_json_of_several_fits_holds_each() -> None:
    fits = [trusted([-1.0, -3], seed=3), trusted([-2.0, -6], seed=4)]
    (row,) = compare({"vae": fits}).to_dict(data_name="x")["rows"]  # type: ignore[misc]
    assert row["num_fits"] == 2
    assert row["seed"] is None  # differs
    assert [fit["seed"] for fit in row["fits"]] == [3, 4]
    assert [fit["mean_log_prob"] for fit in row["fits"]] == [-2, -4]
    assert row["estimator"] == "importance_sampling"
    assert row["fit_se"] == pytest.approx(1)


def test_five_fits_of_each_are_about_the_method() -> None:
    rng = np.random.default_rng(7)
    scores = {name: [result(rng.normal(size=20)) for _ in range(5)] for name in "ab"}
    *_, scope = compare(scores).sentences()
    assert scope == "The interval covers at 95% over draws of test sets and fits."


def fit_coverage(num_fits: int, fit_sd: float) -> float:
    """Share of intervals that hold the true difference 0 of two recipes whose fits differ."""
    rng, covered = np.random.default_rng(8), 0
    for _ in range(400):
        shared = rng.normal(-100, 20, 100)
        fits = [rng.normal(0, fit_sd, (num_fits, 1)) + rng.normal(0, 2, (num_fits, 100)) for _ in "ab"]
        effects = rng.normal(0, 1, (2, 100))  # of the data, the same for all fits of a recipe
        scores = {name: [result(shared + effects[i] + one) for one in fits[i]] for i, name in enumerate("ab")}
        (pair,) = compare(scores).pairs
        covered += not pair.told_apart
    return covered / 400


@pytest.mark.parametrize(("num_fits", "fit_sd"), [(5, 0.0), (5, 0.5), (5, 5.0), (2, 0.5)])
def test_interval_about_recipes_covers(num_fits, fit_sd) -> None:
    """It is conservative, so that only the lower end of the band can be missed."""
    assert fit_coverage(num_fits, fit_sd) >= BAND_400[0]


def test_interval_about_one_fit_of_each_does_not_cover_the_recipes() -> None:
    """With fits that differ by sd .5 against a test error of √2·√5/10 = .32 the interval is about the fits alone."""
    assert fit_coverage(1, 0.5) < 0.8


def test_more_fits_are_asked_for_where_they_differ_most() -> None:
    base = np.linspace(-20, -10, 50)
    scores = {"a": [result(base + shift) for shift in (2.0, -1.5)], "b": result(base)}
    text = compare(scores).pairs[0].wanted()
    assert text == "more fits, as they differ by more than the models do; more test data will not help"


def test_unlike_or_missing_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot compare 'a' with 'a': data"):
        compare({"a": [result([-1.0, -2]), result([-1.0, -2], digest="cd" * 32)]})
    with pytest.raises(
        ValueError, match="fits of 'a' must be evaluated in one way, got exact with 0 particles and impor"
    ):
        compare({"a": [result([-1.0, -2]), result([-1.0, -2], "lower")]})
    with pytest.raises(ValueError, match=r"results\['a'\] must hold at least one result, got an empty list"):
        compare({"a": []})
    with pytest.raises(TypeError, match=r"results\['a'\] must be a LogLikelihood, got int"):
        compare({"a": [result([-1.0]), 3]})  # type: ignore[list-item]
