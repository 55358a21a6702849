"""A checkpoint is written whole or not at all, and reading one runs no code of it."""

import pickle

import pytest
import torch

from pyro_vae import checkpoint

PAYLOAD = {"model": {"weight": torch.arange(6.0).view(2, 3) / 7}, "epoch": 3, "best": None, "rows": [{"elbo": -1.25}]}


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"  # its folder is made
    checkpoint.save(path, PAYLOAD)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["weight"], PAYLOAD["model"]["weight"])
    assert {name: loaded[name] for name in ("epoch", "best", "rows")} == {
        "epoch": 3,
        "best": None,
        "rows": PAYLOAD["rows"],
    }
    assert [each.name for each in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, error):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, PAYLOAD)
    old = path.read_bytes()

    def fail(*args):
        if where == "torch.save":
            args[1].write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(error)):
            checkpoint.save(path, {"epoch": 4})
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "it ran"
    torch.save({"format": checkpoint.FORMAT, "model": Touch(trace)}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a readable checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        checkpoint.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("payload", "found"),
    [({"format": 99}, "found 99"), ({"model": {}}, "found None"), ([1, 2], "found list")],
)
def test_another_format_is_refused(tmp_path, payload, found):
    torch.save(payload, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"must be a checkpoint of format {checkpoint.FORMAT}, {found}"):
        checkpoint.load(tmp_path / "checkpoint.pt")


def test_a_file_that_is_missing_or_cut_short_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*checkpoint\.pt"):
        checkpoint.load(path)
    checkpoint.save(path, PAYLOAD)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        checkpoint.load(path)
