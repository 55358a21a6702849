"""Own images enter a run's space unchanged or not at all, and the least likely stand first."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pyro_vae.configuration import Config
from pyro_vae.data import Batch, Data
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.runs import Run
from pyro_vae.scoring import rank, read_batch, write_ranking
from pyro_vae.spaces import Binary, Labels, Quadrants, Quantized, Real

GREYS = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
BITS = GREYS % 2
REALS = GREYS / 64


def scored(log_prob) -> LogLikelihood:
    log_prob = np.asarray(log_prob, dtype=np.float64)
    zeros = np.zeros_like(log_prob)
    return LogLikelihood(
        log_prob, zeros, "exact", "exact", 0, space=Binary((2, 2)), digest="ab" * 32, seed=0, seconds=1.0
    )


def run_in(space, context=None, path=None) -> Run:
    empty = Batch(torch.zeros(1, *space.shape))
    return Run(path, Config("vae"), Data("own", space, empty, empty, empty, context), nn.Identity())


def npy(folder, images):
    np.save(folder / "own.npy", images)
    return folder / "own.npy"


# rank


def test_rank_by_hand_median_minus_3_and_median_absolute_deviation_1() -> None:
    ranking = rank(scored([-1, -2, -100, -3, -4]))
    assert [row.index for row in ranking] == [2, 4, 3, 1, 0]
    assert [row.log_prob for row in ranking] == [-100, -4, -3, -2, -1]
    assert [row.deviation for row in ranking] == pytest.approx([x / 1.4826 for x in (-97, -1, 0, 1, 2)])


def test_deviations_of_a_normal_sample_are_about_its_standard_deviations() -> None:
    z = np.random.default_rng(0).normal(size=4000)
    deviations = np.array([row.deviation for row in rank(scored(-50 + 7 * z))])
    assert deviations.std() == pytest.approx(1, abs=4 * 1.17 / math.sqrt(4000))  # asymptotic sd of a MAD: 1.17 / √n


def test_ties_keep_their_order_and_have_no_deviation() -> None:
    ranking = rank(scored([-5, -5, -9, -5]))
    assert [row.index for row in ranking] == [2, 0, 1, 3]
    assert all(math.isnan(row.deviation) for row in ranking)


def test_ranking_file_reads_back_digit_for_digit(tmp_path) -> None:
    ranking = rank(scored([-1 / 3, -2 / 3, -1e-17]))
    write_ranking(ranking, tmp_path / "outliers.csv")
    with open(tmp_path / "outliers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["index"]), float(r["log_prob"]), float(r["deviation"])) for r in rows] == [
        (r.index, r.log_prob, r.deviation) for r in ranking
    ]


# read_batch: values as they are


@pytest.mark.parametrize(
    ("space", "images"),
    [
        (Binary((4, 4)), BITS),
        (Binary((4, 4)), BITS.astype(bool)),
        (Quantized((4, 4)), GREYS),
        (Quantized((4, 4), 48), GREYS.astype(np.float64)),
        (Real((4, 4)), REALS),
        (Real((4, 4)), GREYS),
        (Real((4, 4), 256), REALS),
    ],
)
def test_values_are_those_of_the_file(space, images, tmp_path) -> None:
    batch = read_batch(npy(tmp_path, images), run_in(space))
    assert batch.obs.dtype == torch.float32
    assert batch.space == space
    assert batch.context is None
    np.testing.assert_array_equal(batch.obs.numpy(), images.astype(np.float32))


def test_npy_npz_and_folder_give_the_same_batch(tmp_path) -> None:
    np.savez(tmp_path / "own.npz", anything=GREYS)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(GREYS):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    paths = [npy(tmp_path, GREYS), tmp_path / "own.npz", tmp_path / "images"]
    assert len({read_batch(path, run_in(Quantized((4, 4)))).digest for path in paths}) == 1


def test_labels_become_one_hot_rows(tmp_path) -> None:
    np.savez(tmp_path / "own.npz", images=GREYS, labels=np.array([2, 0, 2]))
    batch = read_batch(tmp_path / "own.npz", run_in(Quantized((4, 4)), Labels((0.0, 0.0, 0.0))))
    assert batch.context.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]


def test_quadrants_split_each_image_and_show_the_given_part_in_unit_range(tmp_path) -> None:
    context = Quadrants(1, (4, 4))
    batch = read_batch(npy(tmp_path, GREYS), run_in(Quantized((12,), 101), context))
    np.testing.assert_allclose(batch.context.numpy(), GREYS[:, 2:, :2].reshape(3, 4) / 100, rtol=1e-6)
    joined = context.join(100 * batch.context, batch.obs)
    np.testing.assert_allclose(joined.numpy(), GREYS, rtol=1e-6)


# read_batch: bits from grey levels


@pytest.mark.parametrize("images", [np.full((500, 4, 4), 0.3), np.full((500, 4, 4), 51, dtype=np.uint8)])
def test_bits_have_the_mean_of_the_grey_levels_and_come_from_the_seed(images, tmp_path) -> None:
    path, run = npy(tmp_path, images), run_in(Binary((4, 4)))
    first, again, other = (read_batch(path, run, binarize=True, seed=seed) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    mean = 0.3 if images.dtype.kind == "f" else 51 / 255
    error = math.sqrt(mean * (1 - mean) / first.obs.numel())
    assert first.obs.double().mean().item() == pytest.approx(mean, abs=4 * error)
    assert set(first.obs.unique().tolist()) == {0, 1}


def test_binarize_leaves_bits_as_they_are(tmp_path) -> None:
    batch = read_batch(npy(tmp_path, BITS), run_in(Binary((4, 4))), binarize=True, seed=5)
    np.testing.assert_array_equal(batch.obs.numpy(), BITS)


def test_bits_are_drawn_before_the_image_is_split(tmp_path) -> None:
    batch = read_batch(npy(tmp_path, REALS), run_in(Binary((12,)), Quadrants(1, (4, 4))), binarize=True)
    assert {*batch.obs.unique().tolist(), *batch.context.unique().tolist()} <= {0, 1}


# what is refused


@pytest.mark.parametrize(
    ("space", "context", "images", "binarize", "message"),
    [
        (Quantized((8, 8)), None, GREYS, False, r"must have shape \(batch, 8, 8\), got \(3, 4, 4\)"),
        (Binary((4, 4)), None, REALS, False, "must hold 0 and 1 only for Binary, but datum 0 holds 0.015625"),
        (Quantized((4, 4), 17), None, GREYS, False, r"whole numbers from 0 to 16 .* datum 1 holds 17"),
        (Quantized((4, 4)), None, REALS, False, "must hold whole numbers from 0 to 255"),
        (Real((4, 4), 256), None, GREYS, False, r"numbers in \[0, 1\), grey levels as \(x \+ u\) / 256, .* found 1"),
        (Real((12,), 256), Quadrants(1, (4, 4)), GREYS, False, r"must hold numbers in \[0, 1\)"),
        (Quantized((12,)), Quadrants(1, (4, 4)), GREYS[:, :2], False, r"\(batch, 4, 4\), got \(3, 2, 4\)"),
        (Quantized((4, 4)), Labels((0.0, 0.0)), GREYS, False, "has no labels, and the model is given labels"),
        (Binary((4, 4)), None, 2 * REALS, True, r"must hold probabilities in \[0, 1\]"),
    ],
)
def test_error_names_the_file_and_what_was_expected(space, context, images, binarize, message, tmp_path) -> None:
    path = npy(tmp_path, images)
    with pytest.raises(ValueError, match=message) as caught:
        read_batch(path, run_in(space, context), binarize=binarize)
    assert str(path) in str(caught.value)


def test_binarize_is_refused_where_there_are_no_bits(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"binarize is for models of bits; this one lives in Quantized\(256\)"):
        read_batch(npy(tmp_path, GREYS), run_in(Quantized((4, 4))), binarize=True)


def test_label_beyond_those_of_the_run_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "own.npz", images=GREYS, labels=np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"own\.npz must be below 2, found 2"):
        read_batch(tmp_path / "own.npz", run_in(Quantized((4, 4)), Labels((0.0, 0.0))))


def test_file_of_splits_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "set.npz", train=GREYS, test=GREYS)
    with pytest.raises(ValueError, match="must hold one array of images, found train, test"):
        read_batch(tmp_path / "set.npz", run_in(Quantized((4, 4))))
