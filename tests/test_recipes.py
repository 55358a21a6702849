"""`all` names every model that has a p(x) of the data, and every recipe can be built and fitted as it says."""

import pytest

import pyro_vae as pv
from pyro_vae import configuration, models, recipes


def has_density(name, data):
    cls = configuration.model_class(name)
    return isinstance(data.space, cls.spaces) and getattr(cls, "no_log_prob", None) is None


@pytest.mark.parametrize("space", ["binary", "quantized", "real"])
def test_all_names_every_model_that_has_a_density(space):
    data = pv.load_data("digits", space=space, seed=0)
    found = {entry.model for entry in recipes.named_entries(data, ["all"])}
    wanted = {name for name in models.listing() if has_density(name, data)}
    assert found == wanted - {"conditional_independent_pixel"}  # which has p(x given a context) only


def test_all_of_conditional_data_are_the_conditional_models():
    data = pv.load_data("digits", space="binary", seed=0).given("quadrants")
    assert {entry.model for entry in recipes.all_entries(data)} == {"conditional_independent_pixel", "cvae"}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("space", ["binary", "quantized", "real"])
def test_every_recipe_is_one_that_its_model_takes(space, size, monkeypatch):
    if size == "large":
        monkeypatch.setattr(recipes, "LARGE", 1000)
    data = pv.load_data("digits", space=space, seed=0)
    for entry in recipes.all_entries(data):
        given = data.given("label") if configuration.is_conditional(entry.model) else data
        configuration.build_model(entry.model, given, entry.options)
        configuration.check_settings(entry.model, entry.fit)


def test_all_stands_alone():
    data = pv.load_data("digits", space="binary", seed=0)
    with pytest.raises(ValueError, match="'all' stands for all rows, and alone, got all, vae"):
        recipes.named_entries(data, ["all", "vae"])
