# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Every model of p(x) in one table
#
# Independent pixels, a mixture, the chain rule in three architectures, energies whose constant must be estimated, and
# latent variables: all give log p(x) in nats of the same held-out bits (digits of scikit-learn, 8x8, each grey level
# a Bernoulli draw), each with the side of the truth on which its figure lies. `pyro-vae compare --data digits
# --space binary --models all --estimator multilevel --proposal refined` does the same from the command line.
# With the environment variable `PYRO_VAE_SMALL=1` the fits are too short to mean anything, and all cells run in
# seconds.

# %%
import os
import time
from dataclasses import replace

import torch
from IPython.display import Image

import pyro_vae as pv
from pyro_vae import configuration, recipes
from pyro_vae.fitting import own_method

small = os.environ.get("PYRO_VAE_SMALL") == "1"
data = pv.load_data("digits", space="binary", seed=0)
if small:
    data = replace(data, train=data.train.subset(150, 0), test=data.test.subset(60, 0), intensity=None)
entries = recipes.all_entries(data)
print(f"{data.space}: {len(data.train)} train, {len(data.valid)} valid, {len(data.test)} test images")
print(f"models: {', '.join(entry.name for entry in entries)}")

# %% [markdown]
# ## Fit
# Each model by its own way: EM or a closed form where there is one, contrastive divergence for energies, SVI with the
# ELBO or the exact log p(x) elsewhere. Parameters are chosen on validation data.


# %%
def settings(entry):
    """Those of the recipe; in small, one epoch of what runs in epochs, and few steps to the constant of an energy."""
    model_class = configuration.model_class(entry.model)
    if not small or own_method(model_class) == "maximum_likelihood":
        return entry.fit
    constant = {"log_z_steps": 20, "log_z_chains": 10} if hasattr(model_class, "estimate_log_partition") else {}
    return {**entry.fit, "num_epochs": 1, **constant}


fitted, train_seconds = {}, {}
for entry in entries:
    torch.manual_seed(0)
    given = data.given("label") if configuration.is_conditional(entry.model) else data
    model = configuration.build_model(entry.model, given, entry.options)
    history = pv.fit(model, given, seed=0, **settings(entry))
    fitted[entry.name], train_seconds[entry.name] = (model, given), history.seconds
    print(f"{entry.name}: {history.status} after {history.seconds:.1f} s and {len(history.rows)} epochs or iterations")

# %% [markdown]
# ## Score
# Exact where log p(x) can be computed, multilevel estimation with a proposal refined to each image for the latent
# variable models. The conditional VAE gives log p(x) by a sum over its labels, which is a lower bound. An energy is
# known up to its constant, whose estimate is too small in expectation: its figure is an upper bound, with one error
# for all images.

# %%
estimator = pv.importance_sampling(50) if small else pv.multilevel(500, proposal=pv.refined())
results = {}
for name, (model, given) in fitted.items():
    started = time.perf_counter()
    result = pv.log_likelihood(model, given.test, estimator=estimator, seed=0)
    results[name] = result if result.marginal is None else result.marginal
    print(f"{name}: {results[name]!r}, {time.perf_counter() - started:.1f} s")

# %% [markdown]
# ## The table

# %%
comparison = pv.compare(results, train_seconds=train_seconds)
print(comparison.table(), comparison.pairs_table(), sep="\n\n")

# %% [markdown]
# ## The answer

# %%
best, *others = comparison.rows
unsure = [pair for pair in comparison.pairs if best.model in (pair.a, pair.b) and not pair.told_apart]
rivals = [pair.b if pair.a == best.model else pair.a for pair in unsure]
directions = {"exact": "exactly", "lower": "at least", "upper": "at most", "unbiased": "without a known bias"}
print(
    f"Of {len(comparison.rows)} models, one fit each, {best.model} has the highest figure on {comparison.num_data} "
    f"held-out digits, {directions[best.direction]} {best.mean:.2f} nats per image; "
    + (f"it cannot be told apart from {', '.join(rivals)}" if rivals else "it is told apart from all others")
    + f"; {others[-1].model} comes last with {others[-1].mean:.2f}."
)
Image(pv.plots.plot_comparison(comparison, "comparison.png"))
