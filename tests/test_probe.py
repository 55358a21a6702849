"""A linear classifier on codes, against closed forms, enumeration and an optimiser of our own."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from pyro_vae.probe import Probe, binomial_interval, compare_probes, holm, linear_probe, mcnemar


def two_normals(num, shift, seed, num_dims=3):
    """Codes of two classes N(±shift/2 e_1, I), with labels 0 and 1."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, num)
    codes = generator.standard_normal((num, num_dims))
    codes[:, 0] += shift * (labels - 0.5)
    return codes, labels


def three_parts(sizes=(400, 200, 300), shift=1.5, num_dims=3):
    parts = [two_normals(num, shift, seed, num_dims) for seed, num in enumerate(sizes)]
    return [part[0] for part in parts], [part[1] for part in parts]


def probe_of(correct, labels=None):
    correct = np.asarray(correct, dtype=bool)
    return Probe(correct, 0.0, 1.0, 0.95, 1.0, 1.0, np.zeros(len(correct), int) if labels is None else labels)


# --- the interval and the tests -----------------------------------------------------------------------------------


def test_interval_of_none_and_all_is_the_closed_form():
    low, high = binomial_interval(0, 20, 0.95)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-12))
    assert binomial_interval(20, 20, 0.95) == (pytest.approx(0.025 ** (1 / 20), abs=1e-12), 1.0)


def test_ends_of_the_interval_are_where_a_tail_has_half_of_what_is_left():
    for successes in (1, 7, 19):
        low, high = binomial_interval(successes, 20, 0.9)
        assert binom.sf(successes - 1, 20, low) == pytest.approx(0.05, abs=1e-9)
        assert binom.cdf(successes, 20, high) == pytest.approx(0.05, abs=1e-9)


def test_mcnemar_is_the_sum_over_all_ways_to_be_right_alone():
    for only_a, only_b in itertools.product(range(6), repeat=2):
        total = only_a + only_b
        counts = [sum(way) for way in itertools.product((0, 1), repeat=total)]
        as_far = [abs(2 * count - total) >= abs(only_a - only_b) for count in counts]
        assert mcnemar(only_a, only_b) == pytest.approx(np.mean(as_far), abs=1e-12)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]


def test_pairs_are_counted_on_the_same_data():
    a, b, c = probe_of([1, 1, 1, 1, 0, 1, 1, 1]), probe_of([0, 0, 1, 0, 1, 0, 0, 0]), probe_of([1, 1, 1, 1, 0, 1, 1, 0])
    pairs = {(pair.a, pair.b): pair for pair in compare_probes({"b": b, "c": c, "a": a})}
    assert set(pairs) == {("a", "b"), ("a", "c"), ("c", "b")}
    found = pairs["a", "b"]
    assert (found.only_a, found.only_b, found.difference) == (6, 1, 5 / 8)
    assert found.p_value == pytest.approx(2 * (1 + 7) / 2**7)
    assert found.adjusted == pytest.approx(3 * found.p_value)


def test_probes_of_other_data_are_not_compared():
    with pytest.raises(ValueError, match="the labels of b and a differ"):
        compare_probes({"a": probe_of([1, 0]), "b": probe_of([1, 0], labels=np.array([0, 1]))})
    with pytest.raises(ValueError, match="at least 2, got 1"):
        compare_probes({"a": probe_of([1, 0])})


# --- the classifier -----------------------------------------------------------------------------------------------


def test_two_normals_are_told_apart_as_well_as_can_be():
    # the best rule is linear, with accuracy Φ(δ/2)
    shift, num = 2.0, 20_000
    codes, labels = three_parts((4000, 2000, num), shift)
    probe = linear_probe(codes, labels)
    best = norm.cdf(shift / 2)
    # 4 standard errors of the test data; below it, what 4 weights from 4,000 data cost, about 4 / (2 x 4,000)
    assert best - 0.001 - 4 * math.sqrt(best * (1 - best) / num) < probe.accuracy
    assert probe.accuracy < best + 4 * math.sqrt(best * (1 - best) / num)
    assert probe.low < best < probe.high


def test_codes_that_know_nothing_of_the_label_do_no_better_than_chance():
    codes, labels = three_parts((400, 400, 4000), shift=0.0)
    assert linear_probe(codes, labels).accuracy == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))  # 4 SE


def test_weights_are_those_of_an_optimiser_of_our_own():
    codes, labels = three_parts((120, 60, 500), shift=1.0)
    for part, label in zip(codes, labels, strict=True):
        label += 2 * (part[:, 1] > 1)  # four classes
    strength = 0.1
    center, scale = codes[0].mean(0), codes[0].std(0)
    rows = [torch.from_numpy((part - center) / scale) for part in codes]
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        fit = torch.nn.functional.cross_entropy(rows[0] @ weight + bias, torch.from_numpy(labels[0]), reduction="sum")
        total = strength * fit + weight.square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    logits = (rows[2] @ weight + bias).detach()
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1] > 0.02).numpy()  # far more than either optimiser leaves
    assert clear.mean() > 0.9
    expected = logits.argmax(1).numpy() == labels[2]
    found = linear_probe(codes, labels, strengths=[strength]).correct
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_scale_and_place_of_the_codes_do_not_matter():
    codes, labels = three_parts()
    moved = [part * [10.0, 0.01, 3.0] + [5.0, -2.0, 100.0] for part in codes]
    for strength in (0.001, 1.0):
        ours, theirs = (linear_probe(each, labels, strengths=[strength]) for each in (codes, moved))
        np.testing.assert_array_equal(ours.correct, theirs.correct)


def test_a_unit_that_never_varies_is_no_matter():
    codes, labels = three_parts()
    wider = [np.hstack([part, np.full((len(part), 1), 7.0)]) for part in codes]
    np.testing.assert_array_equal(linear_probe(wider, labels).correct, linear_probe(codes, labels).correct)


def test_strength_is_chosen_on_validation_data_alone():
    codes, labels = three_parts((30, 200, 300), num_dims=25)  # few data, many units: weak fits do better
    strengths = (1e-3, 1e-2, 1e-1, 1.0, 100.0)
    single = {strength: linear_probe(codes, labels, strengths=[strength]) for strength in strengths}
    best = max(each.valid_accuracy for each in single.values())
    chosen = linear_probe(codes, labels, strengths=strengths)
    assert chosen.strength == min(s for s, each in single.items() if each.valid_accuracy == best)
    np.testing.assert_array_equal(chosen.correct, single[chosen.strength].correct)
    swapped = linear_probe([*codes[:2], codes[2][::-1]], [*labels[:2], labels[2][::-1]], strengths=strengths)
    assert swapped.strength == chosen.strength
    np.testing.assert_array_equal(swapped.correct, chosen.correct[::-1])
    assert len({each.valid_accuracy for each in single.values()}) > 1


def test_images_and_tensors_will_do():
    codes, labels = three_parts(num_dims=4)
    images = [torch.from_numpy(part).reshape(-1, 2, 2) for part in codes]
    ours = linear_probe(images, [torch.from_numpy(label) for label in labels])
    np.testing.assert_array_equal(ours.correct, linear_probe(codes, labels).correct)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes, labels: (codes[:2], labels), "three arrays each"),
        (lambda codes, labels: (codes, [*labels[:2], None]), "three arrays each"),
        (lambda codes, labels: (codes, [labels[0][:-1], *labels[1:]]), r"training labels must be .* shape \(400,\)"),
        (lambda codes, labels: (codes, [*labels[:2], labels[2] / 2]), "test labels must be whole numbers"),
        (lambda codes, labels: ([codes[0], codes[1][:, :2], codes[2]], labels), "validation codes must have 3 entries"),
        (lambda codes, labels: ([codes[0], codes[1] * np.nan, codes[2]], labels), "validation codes must be finite"),
        (lambda codes, labels: (codes, [labels[0] * 0, *labels[1:]]), "at least 2 classes"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(*change(*three_parts()))


@pytest.mark.parametrize("strengths", [(), (0.0,), (1.0, math.inf)])
def test_strengths_must_be_positive(strengths):
    with pytest.raises(ValueError, match="strengths must be positive numbers"):
        linear_probe(*three_parts(), strengths=strengths)
