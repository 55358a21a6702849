"""The command line as the tests call it."""

import traceback

from click.testing import CliRunner

from pyro_vae.cli import main

SMALL_NET = ("--set", "latent_dim=2", "--set", "hidden_dims=[8]")
FEW_EPOCHS = ("--fit", "num_epochs=2", "--fit", "batch_size=32")


def call(*args, code=0):
    """The output of a command that must end with `code`, and never in a traceback."""
    outcome = CliRunner().invoke(main, [str(arg) for arg in args])
    trace = "" if outcome.exc_info is None else "".join(traceback.format_exception(*outcome.exc_info))
    assert outcome.exit_code == code, outcome.output + trace
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), trace
    return outcome.output


def train_words(images, out, *options):
    """The command that fits a tiny model to the images."""
    return "train", "--data", images, "--out", out, *SMALL_NET, *FEW_EPOCHS, "--quiet", *options


def trained(images, out, *options):
    """Fit a tiny model to the images."""
    return call(*train_words(images, out, *options))
