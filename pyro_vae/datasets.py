"""Data sets by name or path, and their split into training, validation and test images."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyro_vae.sources import Part, Source, channels_first, read_path


class Named(NamedTuple):
    """A torchvision class, what selects its training and its test part, and the space it is scored in."""

    cls: str
    train: dict[str, Any]
    test: dict[str, Any]
    default: str = "binary"


TORCHVISION = {
    "mnist": Named("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": Named("FashionMNIST", {"train": True}, {"train": False}),
    "kmnist": Named("KMNIST", {"train": True}, {"train": False}),
    "emnist": Named("EMNIST", {"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "omniglot": Named("Omniglot", {"background": True}, {"background": False}),
    "usps": Named("USPS", {"train": True}, {"train": False}),
    "svhn": Named("SVHN", {"split": "train"}, {"split": "test"}, "quantized"),
    "cifar10": Named("CIFAR10", {"train": True}, {"train": False}, "quantized"),
}
LAST_SIXTH_IS_VALID = ("mnist", "fashion_mnist", "kmnist")  # of 60,000 training images
NAMES = ("digits", *TORCHVISION)
SPLIT_STREAM = 0  # of the random streams of one seed


def read(name: str | Path, root: str | Path | None = None) -> Source:
    """The data set called `name`, or the one at the path `name`.

    Args:
        name: one of `NAMES`, or the path of a file or folder. "mnist" is the name, "./mnist" a path.
        root: folder of the torchvision sets, "data" if None; they are downloaded into it where missing.

    Raises:
        ValueError, FileNotFoundError: names the file and the array, what was expected and what was found.
    """
    if name == "digits":
        return _digits()
    if name in TORCHVISION:
        return _torchvision(str(name), Path("data" if root is None else root))
    path = Path(name)
    if path.exists():
        return read_path(path)
    if isinstance(name, str) and path.name == name and not path.suffix:
        raise ValueError(f"data must be one of {', '.join(NAMES)} or a path, got {name!r}")
    raise FileNotFoundError(f"no such file or folder: {path}")


def split(source: Source, seed: int) -> list[Part]:
    """Train, valid and test parts; what the source does not tell apart is drawn from `seed`."""
    parts = source.parts
    if "valid" in parts:
        return [parts["train"], parts["valid"], parts["test"]]
    if "train" in parts:
        train, valid = _take_out(parts["train"], [10], seed)
        return [train, valid, parts["test"]]
    train, test, valid = _take_out(parts["all"], [5, 10], seed)
    return [train, valid, test]


def _take_out(part: Part, divisors: list[int], seed: int) -> list[Part]:
    """What remains, then a random n-th for each divisor n, rounded up; each in the order of the source."""
    num = len(part.images)
    ends = np.cumsum([-(-num // divisor) for divisor in divisors])
    if ends[-1] >= num:
        raise ValueError(f"{part.what} must hold at least {len(divisors) + 1} images to be split, got {num}")
    order = np.random.default_rng([seed, SPLIT_STREAM]).permutation(num)
    *taken, rest = np.split(order, ends)
    return [part.take(np.sort(index)) for index in (rest, *taken)]


def _digits() -> Source:
    """1797 images of 8x8 pixels with grey levels 0..16, inside scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    part = Part("digits", digits.images.astype(np.uint8), digits.target.astype(np.int64))
    return Source("digits", {"all": part}, levels=17, default="quantized")


def _torchvision(name: str, root: Path) -> Source:
    recipe = TORCHVISION[name]
    train = _torchvision_part(name, f"train of {name}", root, recipe.train)
    test = _torchvision_part(name, f"test of {name}", root, recipe.test)
    parts = {"train": train, "test": test}
    if name in LAST_SIXTH_IS_VALID:
        num_train = len(train.images) - len(train.images) // 6
        parts |= {"train": train.take(slice(num_train)), "valid": train.take(slice(num_train, None))}
    if name == "omniglot" and train.labels is not None and test.labels is not None:
        first = int(train.labels.max()) + 1  # the test characters are other characters
        parts["test"] = Part(test.what, test.images, test.labels + first)
    return Source(name, parts, levels=256, default=recipe.default)


def _torchvision_part(name: str, what: str, root: Path, options: dict[str, Any]) -> Part:
    dataset = _open(name, root, options)
    images, labels = _omniglot(dataset) if name == "omniglot" else _stored(dataset)
    if name == "emnist":
        images = images.swapaxes(1, 2)  # torchvision keeps them lying on their side
    return Part(what, channels_first(images), labels.astype(np.int64))


def _open(name: str, root: Path, options: dict[str, Any]) -> Any:
    """The torchvision set from the files under `root`, downloaded if they are missing there."""
    import torchvision.datasets

    cls = getattr(torchvision.datasets, TORCHVISION[name].cls)
    try:
        return cls(str(root), download=False, **options)
    except (RuntimeError, OSError):
        pass  # not there yet
    try:
        return cls(str(root), download=True, **options)
    except (RuntimeError, OSError, zipfile.BadZipFile) as error:
        reason = f"is not in root {str(root)!r} and could not be downloaded: {error}"
        raise FileNotFoundError(f"{name} {reason}") from error


def _stored(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return np.asarray(dataset.data), np.asarray(labels)


def _omniglot(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """105x105 black on white, averaged over boxes to 28x28 and inverted: ink is 255."""
    from PIL import Image

    pairs = [(np.asarray(image.resize((28, 28), Image.Resampling.BOX)), label) for image, label in dataset]
    images, labels = zip(*pairs, strict=True)
    return 255 - np.stack(images), np.asarray(labels)
