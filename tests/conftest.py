"""What several files of tests share: small images and a run that was fitted to them."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
from commands import trained


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """90 images of 4x4 grey levels with a bright row that is the label."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = rng.integers(0, 60, (90, 4, 4)).astype(np.uint8)
    images[np.arange(90), labels] += 190
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="session")
def vae_run(tiny, tmp_path_factory):
    """A run directory; tests that write there write to a copy or to names of their own."""
    out = tmp_path_factory.mktemp("runs") / "vae"
    trained(tiny, out, "--model", "vae")
    return out
