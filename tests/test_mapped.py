"""Images that stay on disk: the values of the same arrays in memory, drawn alike whoever asks, and never read whole."""

import tracemalloc

import numpy as np
import pytest
import torch
from commands import call, train_words
from helpers import same

from pyro_vae import checkpoint, checks
from pyro_vae.data import Batch, load_data
from pyro_vae.estimators.ais import annealed_importance_sampling
from pyro_vae.estimators.evaluate import log_likelihood
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.estimators.router import router
from pyro_vae.fitting import fit
from pyro_vae.mapped import Mapped, uniforms
from pyro_vae.models import CVAE, VAE, BernoulliMixture

RNG = np.random.default_rng(2)
GREYS = {name: RNG.integers(0, 256, (num, 4, 4)).astype(np.uint8) for name, num in (("train", 40), ("test", 9))}
LABELS = {f"{name}_labels": np.arange(len(images)) % 3 for name, images in GREYS.items()}
STAGES = router(30, refined_particles=30, annealing=annealed_importance_sampling(2, 2, 1))
SMALL = {"latent_dim": 2, "hidden_dims": (5,)}


def unpacked(folder, **arrays):
    """The same arrays as an .npz file and as a folder of .npy files."""
    np.savez(folder / "set.npz", **arrays)
    (folder / "set").mkdir()
    for name, array in arrays.items():
        np.save(folder / "set" / f"{name}.npy", array)
    return folder / "set.npz", folder / "set"


@pytest.fixture
def greys(tmp_path):
    return unpacked(tmp_path, **GREYS, **LABELS)


# the values


@pytest.mark.parametrize(
    ("arrays", "space"),
    [
        (GREYS, None),  # quantized, and a tenth of train drawn for validation
        ({"images": GREYS["train"]}, None),
        ({name: (images > 99) for name, images in GREYS.items()}, None),  # bits
        ({name: images / 256 - 0.3 for name, images in GREYS.items()}, None),  # real, in double precision
        ({name: images.astype(np.float32) for name, images in GREYS.items()}, "quantized"),
        ({name: np.repeat(images[..., None], 3, -1) for name, images in GREYS.items()}, None),  # channels last
    ],
)
def test_what_is_not_drawn_has_the_digests_of_the_arrays_in_memory(tmp_path, arrays, space):
    there, here = (load_data(path, space=space, seed=1) for path in unpacked(tmp_path, **arrays))
    assert isinstance(here.train.obs, Mapped)
    assert (here.name, here.space) == (there.name, there.space)
    for name in ("train", "valid", "test"):
        one, other = getattr(there, name), getattr(here, name)
        assert one.digest == other.digest
        assert one.obs.shape == other.obs.shape
        assert torch.equal(one.obs[:3], other.obs[:3])
        index = torch.tensor([2, 0])
        assert torch.equal(one.obs[index], other.obs[index])
        assert torch.equal(one.obs[index], other.obs.take(index)[:])
        assert torch.equal(one.obs[1], other.obs[1])
        assert torch.equal(one.obs[1::2], other.obs[1::2])
        assert torch.equal(one.obs[1::2][:2], other.obs.take(slice(1, None, 2)).take(torch.tensor([0, 1]))[:])
        assert all(torch.equal(*both) for both in zip(one.obs.split(3), other.obs.split(3), strict=True))
        assert torch.equal(one.subset(2).obs, other.subset(2).obs)


PART = range(5, 15)  # of 20 rows on disk
MASK = [True, False] * 5
ALIKE = {  # of what torch takes, too
    "the first": 0,
    "from the end": -1,
    "a number of numpy": np.int64(3),
    "a tensor without axes": torch.tensor(-2),
    "numbers": torch.tensor([3, -1, -10, 9, 3]),
    "short numbers": torch.tensor([3, -1], dtype=torch.int32),
    "a list": [4, -4],
    "an array": np.array([4, -4]),
    "a mask": torch.tensor(MASK),
    "a list of a mask": MASK,
    "an array of a mask": np.array(MASK),
    "a mask of nothing": torch.zeros(10, dtype=torch.bool),
    "no numbers": torch.zeros(0, dtype=torch.int64),
    "an empty list": [],
    "an empty slice": slice(0),
    "a slice past the end": slice(12, 15),
    "a slice from the end": slice(-3, None, 2),
}


@pytest.mark.parametrize("rows", [PART, np.array([7, 2, 19, 0, 1, 3, 3, 8, 9, 4]), range(0, 20, 2), range(9, -1, -1)])
@pytest.mark.parametrize("what", ALIKE)
def test_rows_are_chosen_as_of_a_tensor(what, rows):
    array = RNG.normal(size=(20, 2, 3)).astype(np.float32)
    mapped, memory = Mapped(array, rows), torch.from_numpy(array[np.asarray(rows)])
    found, truth = mapped[ALIKE[what]], memory[ALIKE[what]]
    assert found.shape == truth.shape
    assert torch.equal(found, truth)


@pytest.mark.parametrize(
    ("index", "kind", "message"),
    [
        (100, IndexError, "of 10 rows the numbers go from -10 to 9, got 100"),
        (torch.tensor([2, 12]), IndexError, "of 10 rows the numbers go from -10 to 9, got 12"),  # row 17 on disk
        ([-11], IndexError, "of 10 rows the numbers go from -10 to 9, got -11"),
        (torch.ones(9, dtype=torch.bool), IndexError, "an entry for each of the 10 rows, got 9"),
        ([0.5], TypeError, r"of True and False, got torch.float32 of shape \(1,\)"),
        (torch.ones(10, dtype=torch.uint8), TypeError, "got torch.uint8"),  # which torch takes for a mask
        ([[1, 2]], TypeError, r"got torch.int64 of shape \(1, 2\)"),
        ((1, 2), TypeError, r"got \(1, 2\)"),
        (None, TypeError, "rows are chosen by a whole number, a slice"),
        (..., TypeError, "rows are chosen by a whole number, a slice"),
        ("train", TypeError, "rows are chosen by a whole number, a slice"),
        (slice(None, None, -1), ValueError, "the step of a slice of rows must be 1 or more, got -1"),
    ],
)
def test_an_index_of_no_rows_is_refused(index, kind, message):
    with pytest.raises(kind, match=message):
        Mapped(np.zeros((20, 2, 3)), PART)[index]


def test_no_rows_of_what_is_drawn_are_none(greys):
    for space in ("binary", "real", "quantized"):
        data = load_data(greys[1], space=space)
        assert data.test.obs[:0].shape == (0, *data.space.shape)


def test_one_file_is_split_like_one_array(tmp_path):
    np.savez(tmp_path / "images.npz", GREYS["train"])
    np.save(tmp_path / "images.npy", GREYS["train"])
    digests = [load_data(tmp_path / f"images.{kind}").test.digest for kind in ("npz", "npy")]
    assert digests[0] == digests[1]


def test_labels_and_quadrants_are_given_as_in_memory(greys):
    for what in ("label", "quadrants"):
        there, here = (load_data(path).given(what) for path in greys)
        assert (there.space, there.context) == (here.space, here.context)
        assert there.test.digest == here.test.digest  # obs and context


# what is drawn


def test_uniform_numbers_are_uniform_and_belong_to_their_row():
    rows = np.arange(1000)
    found = uniforms(5, rows, 40)
    assert torch.equal(uniforms(5, rows[[7, 3]], 40), found[[7, 3]])
    assert bool(((found >= 0) & (found < 1)).all())
    assert len(found.unique()) > 0.99 * found.numel()  # of 2**24 numbers
    counts = torch.histc(found, 20, 0, 1)
    expected = found.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 19 + 4 * 38**0.5  # χ², mean and 4 sd
    for other in (uniforms(6, rows, 40), found.roll(1, 0), found.roll(1, 1)):  # seeds, rows, places
        correlation = float(np.corrcoef(found.flatten(), other.flatten())[0, 1])
        assert abs(correlation) < 4 / found.numel() ** 0.5


def test_bits_have_their_probabilities_and_are_drawn_anew_in_each_epoch(tmp_path):
    probabilities = np.linspace(0, 1, 5)[None, :, None].repeat(1000, 0)
    np.save(tmp_path / "p.npy", probabilities)
    data = load_data(tmp_path / "p.npy", space="binary", seed=3)
    generator = torch.Generator().manual_seed(0)
    epochs = [data.epoch(generator).obs for _ in range(2)]
    for bits in (*(epoch[:] for epoch in epochs), data.train.obs[:]):
        error = np.sqrt(0.25 / len(bits))
        np.testing.assert_allclose(bits.mean(0)[:, 0], probabilities[0, :, 0], atol=4 * error)
        assert set(bits.unique().tolist()) == {0, 1}
    assert not torch.equal(epochs[0][:], epochs[1][:])
    index = torch.tensor([9, 4, 30])
    assert torch.equal(epochs[0][index], epochs[0][:][index])  # whoever asks for which batch
    again = load_data(tmp_path / "p.npy", space="binary", seed=3)
    assert again.test.digest == data.test.digest == Batch(data.test.obs[:]).digest
    assert load_data(tmp_path / "p.npy", space="binary", seed=4).test.digest != data.test.digest


def test_given_and_missing_pixels_are_of_one_draw(greys):
    data = load_data(greys[1], space="binary", seed=3)
    parts = data.given("quadrants")
    batch = parts.epoch(torch.Generator().manual_seed(1))
    whole = data.epoch(torch.Generator().manual_seed(1)).obs[:]
    assert torch.equal(parts.context.join(batch.context[:], batch.obs[:]), whole)


def test_dequantised_levels_are_recovered_exactly(greys):
    data = load_data(greys[1], space="real")
    levels = (data.test.obs[:] * 256).floor()
    assert torch.equal(levels, torch.from_numpy(GREYS["test"]).float())


# fits and estimates


@pytest.mark.parametrize("given", [None, "label", "quadrants"])
def test_a_fit_and_its_score_have_the_digits_of_the_arrays_in_memory(greys, given):
    found = []
    for path in greys:
        data = load_data(path) if given is None else load_data(path).given(given)
        torch.manual_seed(0)
        model = VAE(data.space, **SMALL) if given is None else CVAE(data.space, data.context, **SMALL)
        fit(model, data, num_epochs=2, batch_size=16, device="cpu")
        estimator = STAGES if given is None else importance_sampling(30)
        result = log_likelihood(model, data.test, estimator=estimator, device="cpu")
        found.append((model.state_dict(), result.log_prob.tolist()))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_maximum_likelihood_reads_all_training_data(tmp_path):
    models = []
    for path in unpacked(tmp_path, **{name: images > 99 for name, images in GREYS.items()}):
        data = load_data(path)
        models.append(BernoulliMixture(data.space, num_components=2))
        fit(models[-1], data, device="cpu")
    assert same(models[0].state_dict(), models[1].state_dict())


def test_a_fit_of_drawn_bits_goes_on_to_the_same_digits(greys, tmp_path):
    words = train_words(greys[1], tmp_path / "run", "--space", "binary", "--model", "vae")
    call(*words)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    call(*words, "--resume")
    assert same(state["last"], checkpoint.load(tmp_path / "run" / "checkpoint.pt")["last"])
    call("evaluate", tmp_path / "run", "--particles", "20", "--quiet")


def test_nothing_of_the_size_of_the_data_is_held(tmp_path, monkeypatch):
    """Peaks of what is allocated, for a hundred times the data: a few bytes per image may be added, not its pixels."""
    monkeypatch.setattr(checks, "BLOCK_ROWS", 64)
    peaks = []
    for num in (100, 10_000):
        np.save(tmp_path / f"{num}.npy", RNG.integers(0, 256, (num, 16, 16)).astype(np.uint8))
        tracemalloc.start()
        data = load_data(tmp_path / f"{num}.npy", space="quantized")
        data.space.check(data.train.obs)
        _ = data.train.digest, data.train.obs[torch.arange(64)]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 64 * 10_000  # bytes: a quarter of the pixels as they are stored


# what is refused


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train", np.zeros((3, 4, 4), order="F"), "stored row by row .C order., found Fortran order"),
        ("train", np.array([{}]), "train.npy must be a plain array of numbers"),
        ("train", np.zeros((3, 4)), r"array train in .*set must have shape \(n, height, width\)"),
        ("train", np.full((3, 4, 4), 300), "whole numbers from 0 to 255, but datum 0 holds 300"),
        ("train", np.full((3, 4, 4), np.nan), "finite numbers within float32, but datum 0 holds nan"),
        ("other", np.zeros((3, 4, 4)), "may hold only train, test, .* found other"),
    ],
)
def test_arrays_without_a_clear_meaning_are_refused(tmp_path, name, array, message):
    (tmp_path / "set").mkdir()
    for each, images in {"train": GREYS["train"], "test": GREYS["test"], name: array}.items():
        like = array.dtype if array.dtype != object else images.dtype
        np.save(tmp_path / "set" / f"{each}.npy", images if each == name else images.astype(like))
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "set")


def test_a_folder_holds_arrays_or_images(greys, tmp_path):
    (greys[1] / "picture.png").touch()
    with pytest.raises(ValueError, match=r"set must hold .npy files only, found picture.png"):
        load_data(greys[1])
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text.npy must be a plain array of numbers"):
        load_data(tmp_path / "text.npy")
    np.savez(tmp_path / "archive.npz", GREYS["train"])
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(ValueError, match=r"archive.npy must be a single array, found an archive"):
        load_data(tmp_path / "archive.npy")


def test_a_bad_value_far_down_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK_ROWS", 8)
    images = GREYS["train"].astype(np.int64)
    images[29, 2, 1] = -7
    np.save(tmp_path / "x.npy", images)
    with pytest.raises(ValueError, match="but datum 29 holds -7"):
        load_data(tmp_path / "x.npy")
