"""Data are split, binarised and frozen exactly as asked, and whatever has no clear meaning is refused by name."""

import bz2
import hashlib
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from pyro_vae.data import Batch, Data, load_data
from pyro_vae.datasets import TORCHVISION
from pyro_vae.spaces import Binary, Labels, Quadrants, Quantized, Real

MNIST_ROOT = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
DIGITS_TEST_SHA256 = "956116dc3a79e5510876465a3d79098fbfdd8b5d0d8e4a20cb6da966db95a451"
needs_mnist = pytest.mark.skipif(not (MNIST_ROOT / "MNIST").is_dir(), reason="no MNIST files beside the checkout")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def greys(num, shape=(4, 6), levels=256, seed=0):
    return np.random.default_rng(seed).integers(0, levels, (num, *shape)).astype(np.uint8)


def save(folder, **arrays):
    path = folder / "set.npz"
    np.savez(path, **arrays)
    return path


def rows(obs):
    return {image.numpy().tobytes() for image in obs}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture
def grey_file(tmp_path):
    labels = {f"{name}_labels": np.arange(num) % 3 for name, num in (("train", 30), ("valid", 8), ("test", 9))}
    return save(tmp_path, train=greys(30), valid=greys(8, seed=1), test=greys(9, seed=2), **labels)


# Batch


def test_digest_is_the_sha256_of_shapes_and_little_endian_doubles():
    batch = Batch(torch.tensor([[0.0, 1.0], [0.5, 3.0]]), context=torch.tensor([[1.0], [0.0]]))
    text = b"obs (2, 2)\n" + struct.pack("<4d", 0, 1, 0.5, 3) + b"context (2, 1)\n" + struct.pack("<2d", 1, 0)
    assert batch.digest == hashlib.sha256(text).hexdigest()


def test_digest_sees_only_what_is_scored():
    obs = (torch.rand(5000, 3, generator=generator()) < 0.5).float()  # more than one chunk
    batch = Batch(obs)
    assert Batch(obs.double(), labels=torch.zeros(5000).long(), space=Binary((3,))).digest == batch.digest
    assert Batch(-0.0 * obs).digest == Batch(0 * obs).digest
    assert Batch(obs.T.contiguous().T).digest == batch.digest  # memory layout
    assert Batch(obs, context=obs).digest != batch.digest
    assert Batch(obs.reshape(3, 5000)).digest != batch.digest


def test_digest_changes_with_one_bit_even_in_place():
    batch = Batch(torch.zeros(5000, 3))
    before = batch.digest
    batch.obs[-1, -1] = 1
    changed = batch.digest
    batch.obs[-1, -1] = 0
    assert changed != before
    assert batch.digest == before


def test_subset_is_a_seeded_random_draw_without_replacement():
    obs = torch.arange(1000.0).reshape(1000, 1)
    batch = Batch(obs, context=obs + 1, labels=torch.arange(1000))
    subset = batch.subset(400, seed=3)
    assert len(subset) == 400
    assert len(subset.labels.unique()) == 400
    assert torch.equal(subset.obs[:, 0].long(), subset.labels)
    assert torch.equal(subset.context, subset.obs + 1)
    # the mean of 400 of 0..999 without replacement: 499.5, sd 289 sqrt(0.6 / 400) = 11.2; the first 400 have 199.5
    assert abs(float(subset.obs.mean()) - 499.5) < 4 * 11.2
    assert subset.digest == batch.subset(400, seed=3).digest != batch.subset(400, seed=4).digest
    assert batch.subset(1000).digest == batch.digest


@pytest.mark.parametrize("num", [0, 4])
def test_subset_of_impossible_size_is_refused(num):
    with pytest.raises(ValueError, match=f"num must be from 1 to 3, got {num}"):
        Batch(torch.zeros(3, 2)).subset(num)


def test_batch_moves_as_a_whole():
    batch = Batch(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2).long(), Real((3,))).to("meta")
    assert {batch.obs.device.type, batch.context.device.type, batch.labels.device.type} == {"meta"}
    assert batch.space == Real((3,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"obs": np.zeros((2, 3))}, "obs must be a torch tensor, got ndarray"),
        ({"obs": torch.tensor(1.0)}, r"obs must have shape \(batch, ...\), got \(\)"),
        ({"obs": torch.zeros(2, 3), "context": torch.zeros(3, 1)}, r"context must have one row per datum \(2\)"),
        ({"obs": torch.zeros(2, 3), "labels": torch.zeros(1)}, r"labels must have one row per datum \(2\)"),
    ],
)
def test_batch_refuses_rows_that_do_not_match(fields, message):
    with pytest.raises(ValueError, match=message):
        Batch(**fields)


# splits


def test_digits_are_split_without_loss_or_overlap(digits):
    from sklearn.datasets import load_digits

    truth = load_digits()
    assert digits.name == "digits"
    assert digits.space == Quantized((8, 8), 17)
    assert [len(b) for b in (digits.train, digits.valid, digits.test)] == [1257, 180, 360]
    parts = [digits.train, digits.valid, digits.test]
    pixels = torch.cat([torch.cat([b.obs.flatten(1), b.labels[:, None].float()], 1) for b in parts])
    expected = torch.from_numpy(np.column_stack([truth.data, truth.target])).float()
    assert sorted(map(tuple, pixels.tolist())) == sorted(map(tuple, expected.tolist()))
    for batch in parts:
        digits.space.check(batch.obs)
        assert batch.space == digits.space


def test_digits_test_set_is_the_same_on_every_machine(digits):
    assert digits.test.digest == load_data("digits").test.digest == DIGITS_TEST_SHA256


def test_split_is_drawn_from_the_seed(digits):
    other = load_data("digits", seed=1)
    assert len(other.test) == 360
    assert other.test.digest != digits.test.digest


def test_one_array_is_split_70_10_20(tmp_path):
    images = np.arange(70, dtype=np.float64).reshape(70, 1, 1)
    data = load_data(save(tmp_path, anything=images, labels=np.arange(70)), space="real")
    assert [len(b) for b in (data.train, data.valid, data.test)] == [49, 7, 14]
    obs = torch.cat([data.train.obs, data.valid.obs, data.test.obs]).flatten()
    labels = torch.cat([data.train.labels, data.valid.labels, data.test.labels])
    assert torch.equal(obs.long(), labels)
    assert torch.equal(labels.sort().values, torch.arange(70))


def test_missing_validation_is_a_tenth_of_train(tmp_path):
    train = np.arange(40.0).reshape(40, 1, 1)
    data = load_data(save(tmp_path, train=train, test=train[:7] + 100), space="real")
    assert [len(b) for b in (data.train, data.valid, data.test)] == [36, 4, 7]
    both = torch.cat([data.train.obs, data.valid.obs]).flatten()
    assert torch.equal(both.sort().values, torch.arange(40.0))
    assert torch.equal(data.test.obs.flatten(), torch.arange(100.0, 107.0))


def test_whole_numbers_as_floats_must_be_given_a_meaning(tmp_path):
    path = save(tmp_path, x=np.arange(70.0).reshape(70, 1, 1))
    with pytest.raises(ValueError, match="holds whole numbers as floats: say space='quantized'"):
        load_data(path)
    assert str(load_data(path, space="quantized").space) == "Quantized(256)"


@pytest.mark.parametrize(("num", "names"), [(2, ("x",)), (1, ("train", "test"))])
def test_too_few_images_to_split_are_refused(tmp_path, num, names):
    path = save(tmp_path, **{name: greys(num) for name in names})
    with pytest.raises(ValueError, match=rf"array {names[0]} in .*set.npz must hold at least \d images .* got {num}"):
        load_data(path)


# spaces


def test_grey_levels_are_kept_as_they_are(grey_file):
    data = load_data(grey_file)
    assert data.name == "set"
    assert data.space == Quantized((4, 6), 256)
    assert np.array_equal(data.train.obs.numpy(), greys(30))
    assert np.array_equal(data.valid.obs.numpy(), greys(8, seed=1))
    assert np.array_equal(data.test.obs.numpy(), greys(9, seed=2))
    assert data.test.obs.dtype == torch.float32
    assert torch.equal(data.test.labels, torch.arange(9) % 3)
    assert data.epoch(generator()) is data.train


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, ">f8"])
def test_bits_in_a_file_are_never_redrawn(tmp_path, dtype):
    bits = greys(20, levels=2)
    data = load_data(
        save(tmp_path, train=bits.astype(dtype), valid=bits[:4].astype(dtype), test=bits[:5].astype(dtype))
    )
    assert data.space == Binary((4, 6))
    assert data.intensity is None
    assert np.array_equal(data.train.obs.numpy(), bits)
    assert torch.equal(data.epoch(generator()).obs, data.train.obs)


def test_floats_are_real_unless_asked_otherwise(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 3, 5))
    data = load_data(save(tmp_path, train=values, valid=values, test=values))
    assert data.space == Real((3, 5))
    assert np.array_equal(data.test.obs.numpy(), values.astype(np.float32))


def test_whole_floats_can_be_grey_levels(tmp_path):
    data = load_data(save(tmp_path, train=greys(9) * 1.0, valid=greys(9) * 1.0, test=greys(9) * 1.0), space="quantized")
    assert data.space == Quantized((4, 6), 256)
    assert np.array_equal(data.train.obs.numpy(), greys(9))


@pytest.mark.parametrize("levels", [2, 256])
def test_dequantised_levels_are_recovered_exactly(tmp_path, levels):
    stored = greys(2000, shape=(10, 10), levels=levels)
    stored[0, 0, 0] = levels - 1
    data = load_data(save(tmp_path, train=stored, valid=stored, test=stored), space="real")
    assert data.space == Real((10, 10), levels)
    for batch in (data.train, data.valid, data.test):
        assert np.array_equal((batch.obs * levels).floor().numpy(), stored)
        noise = (batch.obs.double() * levels).numpy() - stored
        assert abs(noise.mean() - 0.5) < 4 * np.sqrt(1 / 12 / noise.size)
    assert data.train.digest != data.valid.digest != data.test.digest  # one stream each


def test_dequantised_digits_are_recovered_exactly(digits):
    real = load_data("digits", space="real")
    assert real.space == Real((8, 8), 17)
    assert torch.equal((real.test.obs * 17).floor(), digits.test.obs)


@pytest.mark.parametrize(("space", "kind"), [("binary", Binary), ("quantized", Quantized), ("real", Real)])
@pytest.mark.parametrize("levels", [2, 256])
def test_every_space_holds_its_observations(tmp_path, space, kind, levels):
    data = load_data(save(tmp_path, x=greys(40, levels=levels)), space=space)
    assert isinstance(data.space, kind)
    for batch in (data.train, data.valid, data.test):
        assert batch.space == data.space
        data.space.check(batch.obs)


@pytest.mark.parametrize(
    ("stored", "shape"),
    [((5, 7, 3), (3, 5, 7)), ((5, 7, 1), (1, 5, 7)), ((3, 5, 7), (3, 5, 7)), ((1, 5, 3), (1, 5, 3)), ((5, 7), (5, 7))],
)
def test_channels_come_first(tmp_path, stored, shape):
    images = greys(10, shape=stored)
    data = load_data(save(tmp_path, train=images, valid=images, test=images))
    assert data.space.shape == shape
    expected = np.moveaxis(images, -1, 1) if stored != shape else images
    assert np.array_equal(data.test.obs.numpy(), expected)


# binarisation


@pytest.fixture
def probabilities(tmp_path):
    images = np.random.default_rng(0).random((50, 6, 6))
    images[:, 0], images[:, 1] = 0, 1
    return save(tmp_path, train=images, valid=images[:20], test=images[:20])


def test_dynamic_epochs_differ_and_average_to_the_intensity(probabilities):
    data = load_data(probabilities, space="binary")
    stream = generator()
    epochs = torch.stack([data.epoch(stream).obs for _ in range(400)])
    data.space.check(epochs[0])
    assert not torch.equal(epochs[0], epochs[1])
    with np.load(probabilities) as stored:
        assert np.array_equal(data.intensity.numpy(), stored["train"].astype(np.float32))
    error = epochs.mean(0) - data.intensity
    spread = (data.intensity * (1 - data.intensity) / 400).sqrt()
    assert bool((error[spread == 0] == 0).all())  # black and white pixels stay
    z = (error / spread)[spread > 0]
    assert abs(float(z.mean())) < 4 / len(z) ** 0.5
    assert abs(float(z.square().mean()) - 1) < 4 * (2 / len(z)) ** 0.5


def test_grey_levels_are_probabilities_of_bits(grey_file):
    data = load_data(grey_file, space="binary")
    assert np.allclose(data.intensity.numpy(), greys(30) / 255, rtol=1e-6)
    assert data.space == Binary((4, 6))
    assert torch.equal(data.epoch(generator()).labels, data.train.labels)


def test_the_first_draws_are_frozen(probabilities):
    data, again = load_data(probabilities, space="binary"), load_data(probabilities, space="binary")
    before = [batch.digest for batch in (data.train, data.valid, data.test)]
    data.epoch(generator(1))
    load_data(probabilities, space="binary", seed=1).epoch(generator(1))
    assert [batch.digest for batch in (data.train, data.valid, data.test)] == before
    assert [batch.digest for batch in (again.train, again.valid, again.test)] == before


def test_each_split_and_each_seed_has_its_own_stream(probabilities):
    data, other = (load_data(probabilities, space="binary", seed=seed) for seed in (0, 1))
    digests = [batch.digest for d in (data, other) for batch in (d.train.subset(50), d.valid, d.test)]
    assert len(set(digests)) == 6
    assert not torch.equal(data.valid.obs, data.train.obs[:20])  # the same probabilities, other draws


def test_static_binarisation_is_one_draw(probabilities):
    static = load_data(probabilities, space="binary", binarization="static")
    assert static.intensity is None
    assert static.epoch(generator(1)) is static.train
    assert static.train.digest == load_data(probabilities, space="binary").train.digest


def test_loading_and_drawing_leave_the_global_random_state(probabilities):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_data(probabilities, space="binary").epoch(generator())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


# context


def test_label_context_is_one_hot_with_a_normalised_prior(digits):
    data = digits.given("label")
    assert isinstance(data.context, Labels)
    assert data.context.num_dims == 10
    log_prob = torch.tensor(data.context.log_prob, dtype=torch.float64)
    assert abs(float(log_prob.logsumexp(0))) < 1e-12
    counts = torch.bincount(digits.train.labels, minlength=10)
    assert torch.allclose(log_prob.exp(), (counts + 1).double() / 1267)
    for batch, plain in ((data.train, digits.train), (data.valid, digits.valid), (data.test, digits.test)):
        assert batch.context.dtype == torch.float32
        assert torch.equal(batch.context.argmax(1), plain.labels)
        assert torch.equal(batch.context.sum(1), torch.ones(len(plain)))
        assert torch.equal(batch.obs, plain.obs)
        assert batch.digest != plain.digest


def test_a_class_that_train_never_shows_has_positive_probability(tmp_path):
    labels = {"train_labels": np.zeros(8, int), "valid_labels": np.zeros(8, int), "test_labels": np.full(8, 2)}
    data = load_data(save(tmp_path, train=greys(8), valid=greys(8), test=greys(8), **labels)).given("label")
    assert np.allclose(np.exp(data.context.log_prob), [9 / 11, 1 / 11, 1 / 11])


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("space", ["quantized", "real"])
def test_quadrants_split_the_image_and_score_only_what_is_missing(num, space):
    whole = load_data("digits", space=space)
    data = whole.given("quadrants", num)
    assert data.context == Quadrants(num, (8, 8))
    assert data.space.num_dims == 64 - 16 * num
    assert type(data.space) is type(whole.space)
    data.space.check(data.test.obs)
    assert data.test.context.shape == (360, 16 * num)
    scale = 16 if space == "quantized" else 1
    assert torch.equal(data.context.join((data.test.context * scale), data.test.obs), whole.test.obs)
    assert torch.equal(data.test.labels, whole.test.labels)


def test_given_and_missing_pixels_of_an_epoch_are_one_draw(probabilities):
    whole = load_data(probabilities, space="binary")
    data = whole.given("quadrants", 2)
    batch, truth = data.epoch(generator(5)), whole.epoch(generator(5))
    assert torch.equal(data.context.join(batch.context, batch.obs), truth.obs)
    assert not torch.equal(batch.context, data.train.context)
    assert batch.space == data.space


def test_label_context_survives_an_epoch(grey_file):
    data = load_data(grey_file, space="binary").given("label")
    batch = data.epoch(generator())
    assert torch.equal(batch.context, data.train.context)
    assert not torch.equal(batch.obs, data.train.obs)


def test_data_move_as_a_whole(grey_file):
    data = load_data(grey_file, space="binary").given("label").to("meta")
    tensors = (data.intensity, data.train.obs, data.valid.context, data.test.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_conditioning_that_makes_no_sense_is_refused(digits, probabilities, tmp_path):
    with pytest.raises(ValueError, match="data must have no context yet, got data given label"):
        digits.given("label").given("quadrants")
    with pytest.raises(ValueError, match="what must be 'label' or 'quadrants', got 'colour'"):
        digits.given("colour")
    with pytest.raises(ValueError, match="given must be 1, 2 or 3 quadrants, got 4"):
        digits.given("quadrants", 4)
    with pytest.raises(ValueError, match="data given the label must have labels, got none for set"):
        load_data(probabilities).given("label")
    with pytest.raises(ValueError, match=r"at least 2x2 pixels, got shape \(5, 1\)"):
        load_data(save(tmp_path, x=greys(10, shape=(5, 1)))).given("quadrants")


# what is refused: names, paths, .npz files


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "minst"}, "data must be one of digits, mnist, .*cifar10 or a path, got 'minst'"),
        ({"name": "digits", "space": "grey"}, "space must be one of None, 'binary', .* got 'grey'"),
        ({"name": "digits", "binarization": "none"}, "binarization must be one of 'dynamic', .* got 'none'"),
        ({"name": "digits", "seed": -1}, "non-negative"),
    ],
)
def test_unknown_words_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_data(**kwargs)


@pytest.mark.parametrize("name", ["no.npz", "folder/no"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: .*{name}"):
        load_data(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: .*{name}"):
        load_data(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", b"1,2", r"set.csv must be an .npz or .npy file or a folder of images"),
        ("set.npz", np.random.default_rng(0).bytes(500), "set.npz must be an .npz archive .* no zip archive"),
        ("set.npz", b"", "set.npz must be an .npz archive .* no zip archive"),
        ("set.npz", b"PK\x03\x04" + bytes(100), "set.npz must be an .npz archive .* no zip archive"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / name)


def test_an_array_file_under_a_false_name_is_refused(tmp_path):
    with (tmp_path / "set.npz").open("wb") as file:
        np.save(file, greys(10))
    with pytest.raises(ValueError, match="no zip archive"):
        load_data(tmp_path / "set.npz")


def test_a_member_that_is_no_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match=r"notes.txt in .*set.npz must be a NumPy array"):
        load_data(tmp_path / "set.npz")


def test_a_damaged_member_is_refused(tmp_path):
    path = save(tmp_path, x=greys(10))
    content = bytearray(path.read_bytes())
    content[200] ^= 255  # a pixel; the checksum of the archive no longer agrees
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"array x in .*set.npz must be a plain array of numbers: Bad CRC"):
        load_data(path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_objects_are_never_loaded(tmp_path):
    trap = tmp_path / "trap"
    path = save(tmp_path, x=np.array([Bomb(trap)], dtype=object))
    with pytest.raises(ValueError, match=r"array x in .*set.npz must be a plain array of numbers: Object arrays"):
        load_data(path)
    assert not trap.exists()


X, NAN = greys(10), np.full((10, 4, 6), 0.5)
NAN[3, 0, 0] = np.nan
HALF = np.full((10, 4, 6), 0.5)
LOW = np.full((10, 4, 6), -2.0)


@pytest.mark.parametrize(
    ("arrays", "space", "message"),
    [
        ({}, None, "set.npz must hold the arrays train and test, or one array to split, found none"),
        ({"a": X, "b": X}, None, "set.npz must hold .* or one array to split, found a, b"),
        ({"labels": X}, None, "set.npz must hold .* or one array to split, found labels"),
        ({"train": X}, None, "set.npz must hold the arrays train and test, but test is missing"),
        ({"test": X, "valid": X}, None, "set.npz must hold the arrays train and test, but train is missing"),
        ({"train": X, "test": X, "extra": X}, None, "may hold only train, test, train_labels, .* found extra"),
        (
            {"train": X, "test": X, "test_labels": np.arange(10)},
            None,
            "must hold labels for every split or for none, but train_labels is missing",
        ),
        ({"train": NAN, "test": HALF}, None, "array train in .*set.npz must hold finite .* datum 3 holds nan"),
        ({"train": HALF, "test": HALF * np.inf}, None, "array test .* datum 0 holds inf"),
        ({"x": HALF * 1e300}, None, "array x .* finite numbers within float32, but datum 0 holds 5e"),
        ({"x": LOW}, "binary", r"array x in .*set.npz must hold probabilities in \[0, 1\], but datum 0 holds -2"),
        ({"x": HALF}, "quantized", "array x .* must hold whole numbers from 0 to 255, but datum 0 holds 0.5"),
        ({"x": LOW}, "quantized", "array x .* must hold whole numbers from 0 to 255, but datum 0 holds -2"),
        ({"x": X.astype(int) + 300}, None, "array x .* must hold whole numbers from 0 to 255, but datum 0 holds"),
        ({"x": X.astype(int) - 300}, "real", "array x .* must hold whole numbers from 0 to 255"),
        ({"x": X[:0]}, None, r"array x .* must hold at least one image, got shape \(0, 4, 6\)"),
        ({"x": X[0]}, None, r"array x .* must have shape \(n, height, width\) or .*, got \(4, 6\)"),
        ({"x": X[None, None]}, None, r"array x .* must have shape .*, got \(1, 1, 10, 4, 6\)"),
        ({"x": X.astype(complex)}, None, "array x .* must hold bits, whole or real numbers, got dtype complex128"),
        ({"x": X.astype(str)}, None, "array x .* must hold bits, whole or real numbers, got dtype <U3"),
        (
            {"train": X, "test": X[:, :2]},
            None,
            r"array test in .*set.npz must have image shape \(4, 6\) as array train .*, got \(2, 6\)",
        ),
        ({"train": X, "test": HALF}, None, "array test .* must have dtype uint8 as array train .*, got float64"),
        ({"x": X, "labels": np.arange(9)}, None, r"array labels in .* must have shape \(10,\), got \(9,\)"),
        ({"x": X, "labels": np.eye(10)}, None, r"array labels in .* must have shape \(10,\), got \(10, 10\)"),
        ({"x": X, "labels": np.arange(10.0)}, None, "array labels .* must hold whole numbers, got dtype float64"),
        ({"x": X, "labels": np.arange(10) - 1}, None, "array labels .* whole numbers from 0, but datum 0 holds -1"),
        (
            {"train": X, "test": X, "train_labels": np.arange(10), "test_labels": np.arange(3)},
            None,
            r"array test_labels in .*set.npz must have shape \(10,\), got \(3,\)",
        ),
    ],
)
def test_arrays_without_a_clear_meaning_are_refused(tmp_path, arrays, space, message):
    path = save(tmp_path, **arrays)
    with pytest.raises(ValueError, match=message):
        load_data(path, space=space)


# folders of images


def write_images(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02d}{suffix}")


def test_a_folder_of_folders_is_labelled_by_name(tmp_path):
    for label, name in enumerate(("apple", "banana")):
        write_images(tmp_path / "fruit" / name, greys(10, seed=label) // 2 + 128 * label)
    (tmp_path / "fruit" / ".hidden").write_text("ignored")
    data = load_data(tmp_path / "fruit")
    assert data.name == "fruit"
    assert data.space == Quantized((4, 6), 256)
    assert [len(b) for b in (data.train, data.valid, data.test)] == [14, 2, 4]
    for batch in (data.train, data.valid, data.test):
        assert torch.equal((batch.obs >= 128).flatten(1).all(1).long(), batch.labels)
    stored = torch.from_numpy(np.concatenate([greys(10), greys(10, seed=1) // 2 + 128])).float()
    stored[:10] = stored[:10].div(2).floor()
    assert rows(torch.cat([data.train.obs, data.valid.obs, data.test.obs])) == rows(stored)


@pytest.mark.parametrize(
    ("images", "suffix", "space"),
    [
        (greys(10, shape=(4, 6, 3)), ".png", Quantized((3, 4, 6), 256)),
        (greys(10), ".pgm", Quantized((4, 6), 256)),
        (greys(10, levels=2).astype(bool), ".png", Binary((4, 6))),
        (np.random.default_rng(0).random((10, 4, 6)).astype(np.float32), ".tiff", Real((4, 6))),
    ],
)
def test_a_flat_folder_keeps_the_pixels(tmp_path, images, suffix, space):
    write_images(tmp_path / "set", images, suffix)
    data = load_data(str(tmp_path / "set"))
    assert data.space == space
    assert data.train.labels is None
    expected = np.moveaxis(images, -1, 1) if images.ndim == 4 else images
    loaded = torch.cat([data.train.obs, data.valid.obs, data.test.obs])
    assert rows(loaded) == rows(torch.from_numpy(expected.astype(np.float32)))


def folder_with(tmp_path, change):
    folder = tmp_path / "set"
    write_images(folder, greys(10))
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "notes.txt").write_text("x"), r"set must hold images only \(.png .*\), found notes.txt"),
        (lambda f: (f / "sub").mkdir(), "set must hold images or one folder per label, found both"),
        (lambda f: [p.unlink() for p in f.iterdir()], "set must hold images, found none"),
        (
            lambda f: Image.fromarray(greys(1, shape=(5, 6))[0]).save(f / "x.png"),
            "x.png must be L with 4x6 pixels as .*00.png, got L with 5x6 pixels",
        ),
        (
            lambda f: Image.fromarray(greys(1, shape=(4, 6, 3))[0]).save(f / "x.png"),
            "x.png must be L with 4x6 pixels as .*00.png, got RGB with 4x6 pixels",
        ),
        (lambda f: Image.new("RGBA", (6, 4)).save(f / "x.png"), "x.png must have mode .* or RGB, got RGBA"),
        (lambda f: Image.new("P", (6, 4)).save(f / "x.png"), "x.png must have mode .* or RGB, got P"),
        (
            lambda f: Image.new("L", (6, 4)).save(
                f / "x.tiff", save_all=True, append_images=[Image.new("L", (6, 4), 9)]
            ),
            "x.tiff must hold one image, got 2 frames",
        ),
        (
            lambda f: (f / "05.png").write_bytes((f / "05.png").read_bytes()[:60]),
            "05.png cannot be read as an image: ",
        ),
        (lambda f: (f / "05.png").write_bytes(b"nothing"), "05.png cannot be read as an image: "),
    ],
)
def test_folders_without_a_clear_meaning_are_refused(tmp_path, change, message):
    folder = folder_with(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_data(folder)


def test_labelled_folders_without_a_clear_meaning_are_refused(tmp_path):
    for name in ("train", "test"):
        write_images(tmp_path / "splits" / name, greys(3))
    with pytest.raises(ValueError, match="one folder per label, found folders named train and test"):
        load_data(tmp_path / "splits")
    write_images(tmp_path / "labels" / "a", greys(3))
    (tmp_path / "labels" / "b").mkdir()
    with pytest.raises(ValueError, match="b must hold images, found none"):
        load_data(tmp_path / "labels")
    (tmp_path / "labels" / "b" / "deeper").mkdir()
    with pytest.raises(ValueError, match=r"b must hold images only .*, found deeper"):
        load_data(tmp_path / "labels")


# torchvision, without a network


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_idx_set(folder, prefixes, images):
    for prefix, part in zip(prefixes, images, strict=True):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", part)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", (np.arange(len(part)) % 10).astype(np.uint8))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_mnist_like_sets_give_the_end_of_train_to_validation(tmp_path, name):
    images = greys(60, (28, 28)), greys(10, (28, 28), seed=1)
    write_idx_set(tmp_path / TORCHVISION[name].cls / "raw", ("train", "t10k"), images)
    data = load_data(name, root=tmp_path, space="quantized", seed=5)
    assert np.array_equal(data.train.obs.numpy(), images[0][:50])
    assert np.array_equal(data.valid.obs.numpy(), images[0][50:])
    assert np.array_equal(data.test.obs.numpy(), images[1])
    assert torch.equal(data.valid.labels, torch.arange(50, 60) % 10)
    assert load_data(name, root=tmp_path).space == Binary((28, 28))


def test_emnist_is_upright(tmp_path):
    upright = greys(20, (28, 28))
    parts = upright.swapaxes(1, 2), upright.swapaxes(1, 2)
    prefixes = "emnist-balanced-train", "emnist-balanced-test"
    write_idx_set(tmp_path / "EMNIST" / "raw", prefixes, parts)
    data = load_data("emnist", root=tmp_path, space="quantized")
    assert [len(b) for b in (data.train, data.valid, data.test)] == [18, 2, 20]
    assert np.array_equal(data.test.obs.numpy(), upright)


def test_usps_is_read_from_its_files(tmp_path):
    for name, num in (("usps", 20), ("usps.t", 5)):
        pixels = np.linspace(-1, 1, 256)
        line = " ".join(f"{index + 1}:{value:.4f}" for index, value in enumerate(pixels))
        text = "\n".join(f"{1 + row % 10} {line}" for row in range(num))
        (tmp_path / f"{name}.bz2").write_bytes(bz2.compress(text.encode()))
    data = load_data("usps", root=tmp_path)
    assert data.space == Binary((16, 16))
    assert [len(b) for b in (data.train, data.valid, data.test)] == [18, 2, 5]
    assert torch.equal(data.test.labels, torch.arange(5))
    assert float(data.intensity.max()) == 1


def fake(monkeypatch, name, make):
    """In place of the torchvision class of `name`: make(is_train), and no network."""

    def construct(root, download, **options):
        assert not download
        return make(options in (TORCHVISION[name].train,))

    monkeypatch.setattr(torchvision.datasets, TORCHVISION[name].cls, construct)


@pytest.mark.parametrize(
    ("name", "shape", "field"), [("svhn", (3, 32, 32), "labels"), ("cifar10", (32, 32, 3), "targets")]
)
def test_colour_sets_are_channels_first_grey_levels(monkeypatch, name, shape, field):
    images = greys(10, shape)
    fake(monkeypatch, name, lambda is_train: SimpleNamespace(data=images, **{field: list(range(10))}))
    data = load_data(name)
    assert data.space == Quantized((3, 32, 32), 256)
    assert [len(b) for b in (data.train, data.valid, data.test)] == [9, 1, 10]
    expected = images if shape[0] == 3 else np.moveaxis(images, -1, 1)
    assert np.array_equal(data.test.obs.numpy(), expected)
    assert torch.equal(data.test.labels, torch.arange(10))


def test_omniglot_is_averaged_over_boxes_and_inverted(monkeypatch):
    page = np.full((112, 112), 255, np.uint8)  # four pixels to a box; the true size 105 shares pixels between boxes
    page[:4, :2] = 0  # half the first box is ink
    page[4:8, :4] = 0  # all of the box below
    pages = [(Image.fromarray(page), label) for label in (0, 1, 1)]
    fake(monkeypatch, "omniglot", lambda is_train: pages)
    data = load_data("omniglot", space="quantized")
    expected = torch.zeros(28, 28)
    expected[0, 0], expected[1, 0] = 127, 255
    assert torch.equal(data.test.obs[0], expected)
    assert data.test.labels.tolist() == [2, 3, 3]  # other characters than those of train
    assert load_data("omniglot").space == Binary((28, 28))


@pytest.mark.parametrize("name", list(TORCHVISION))
def test_a_failed_download_names_the_set_and_the_root(monkeypatch, tmp_path, name):
    real = getattr(torchvision.datasets, TORCHVISION[name].cls)

    def offline(root, download, **options):
        if download:
            raise URLError("no network")
        return real(root, download=False, **options)

    monkeypatch.setattr(torchvision.datasets, TORCHVISION[name].cls, offline)
    with pytest.raises(FileNotFoundError, match=f"{name} is not in root '{tmp_path}' and could not .*no network"):
        load_data(name, root=tmp_path)


def test_missing_files_are_downloaded_once(monkeypatch, tmp_path):
    calls = []

    def construct(root, download, **options):
        calls.append((root, download))
        if not download:
            raise RuntimeError("Dataset not found")
        return SimpleNamespace(data=greys(12), targets=list(range(12)))

    monkeypatch.setattr(torchvision.datasets, "MNIST", construct)
    assert len(load_data("mnist", root=tmp_path).valid) == 2
    assert calls == [(str(tmp_path), False), (str(tmp_path), True)] * 2


@needs_mnist
def test_mnist_is_split_50_10_10():
    data = load_data("mnist", root=MNIST_ROOT, binarization="static")
    assert isinstance(data, Data)
    assert data.space == Binary((28, 28))
    assert [len(b) for b in (data.train, data.valid, data.test)] == [50_000, 10_000, 10_000]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    data.space.check(data.test.obs)


@pytest.mark.skipif(
    not (MNIST_ROOT / "binarized_mnist.npz").is_file(), reason="no binarized_mnist.npz beside the checkout"
)
def test_static_mnist_keeps_its_bits():
    path = MNIST_ROOT / "binarized_mnist.npz"
    data = load_data(path)
    assert data.name == "binarized_mnist"
    assert data.space == Binary((28, 28))
    assert data.intensity is None
    assert [len(b) for b in (data.train, data.valid, data.test)] == [50_000, 10_000, 10_000]
    with np.load(path) as stored:
        assert np.array_equal(data.test.obs.numpy(), stored["test"])
