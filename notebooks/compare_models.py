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
# # Which model describes handwritten digits best?
#
# Four models, one held-out test set, log p(x) in nats (higher is better), and an honest answer. The 1797 digits of
# scikit-learn have 8x8 pixels with grey levels 0 to 16, so log p is a mass, and so it is for every model below.
# With the environment variable `PYRO_VAE_SMALL=1` the fits are short and all cells run in seconds.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from IPython.display import Image

import pyro_vae as pv

small = os.environ.get("PYRO_VAE_SMALL") == "1"
num_epochs, num_particles = (15, 100) if small else (300, 5000)
data = pv.load_data("digits", seed=0)
print(f"{data.space}: {len(data.train)} train, {len(data.valid)} valid, {len(data.test)} test images")

# %% [markdown]
# The test set is frozen: its SHA-256 stands in every result, and results for other data are never compared with it.

# %%
some = data.train.subset(20, seed=1)
names = [str(int(label)) for label in some.labels]
Image(pv.plots.plot_images(data.space.to_unit(some.obs), "digits.png", titles=names, columns=10))

# %% [markdown]
# ## Fit
# Independent pixels and the Gaussian mixture (normal laws rounded to grey levels) have an exact log p(x) and are
# fitted by maximum likelihood. The VAE and the conditional VAE, which is given the label, maximise the ELBO; training
# keeps the epoch with the best validation ELBO and never sees the test set.

# %%
torch.manual_seed(0)
given_label = data.given("label")
network = {"latent_dim": 16, "hidden_dims": (200, 200)}
models = {
    "independent pixels": pv.models.IndependentPixel(data.space),
    "Gaussian mixture": pv.models.GaussianMixture(data.space, num_components=10),
    "VAE": pv.models.VAE(data.space, **network),
    "CVAE": pv.models.CVAE(data.space, given_label.context, **network),
}
by_svi = {"num_epochs": num_epochs, "batch_size": 64, "learning_rate": 3e-3, "kl_warmup": num_epochs // 15}
train_seconds = {}
for name, model in models.items():
    neural = name in ("VAE", "CVAE")
    history = pv.fit(model, given_label if name == "CVAE" else data, seed=0, **(by_svi if neural else {}))
    train_seconds[name] = history.seconds
    print(f"{name}: {history.status} after {history.seconds:.1f} s, best epoch {history.best_epoch}")

# %% [markdown]
# ## Held-out log p(x)
# Exact where it can be, importance sampling with the guide as proposal elsewhere: a lower bound in expectation.
# The CVAE gives log p(x | label); its `marginal` sums the label out, and is the log p(x) to set beside the others.

# %%
sampler = pv.importance_sampling(num_particles)
results = {
    "independent pixels": pv.log_likelihood(models["independent pixels"], data.test, estimator=pv.exact()),
    "Gaussian mixture": pv.log_likelihood(models["Gaussian mixture"], data.test, estimator=pv.exact()),
    "VAE": pv.log_likelihood(models["VAE"], data.test, estimator=sampler),
}
conditional = pv.log_likelihood(models["CVAE"], given_label.test, estimator=sampler)
results["CVAE"] = conditional.marginal
print(
    f"CVAE: {conditional.quantity} {conditional.mean:.2f}, {conditional.marginal.quantity} {results['CVAE'].mean:.2f}"
)

# %% [markdown]
# Every result is an array with one entry per image, with its Monte Carlo variance, effective sample size and k-hat.
# Where k-hat is above 0.7, the Monte Carlo error is not to be trusted.

# %%
vae = results["VAE"]
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
axes[0].hist(vae.log_prob, 40)
axes[0].set(xlabel="log p(x) (nats)", ylabel="test images")
axes[1].hist(vae.ess, 40)
axes[1].set(xlabel=f"effective sample size of {num_particles} particles")
axes[2].hist(vae.khat[np.isfinite(vae.khat)], 40)
axes[2].axvline(0.7, color="tab:orange")
axes[2].set(xlabel="k-hat")
print(f"median ESS {np.median(vae.ess):.0f}, k-hat above 0.7 for {vae.frac_khat_high:.1%} of the images")

# %% [markdown]
# ## Your own Pyro model
# Any model and guide will do, as plain functions: every site in a plate "data" at dim -1, the data at the site "obs".
# Here bits (ink where the grey level is above 8) come from ten linear factors, and the guide is fitted by plain Pyro.
# Bits and grey levels have no common scale, and `compare` refuses to put the two into one table.

# %%
bits = pv.Batch((data.test.obs > 8).float())
train_bits = (data.train.obs > 8).float()
loadings, encoder = torch.nn.Linear(10, 64), torch.nn.Linear(64, 20)


def factor_model(obs):
    with pyro.plate("data", len(obs), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        logits = loadings(z).unflatten(-1, (8, 8))
        pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(2), obs=obs)


def factor_guide(obs):
    with pyro.plate("data", len(obs), dim=-1):
        loc, log_scale = encoder(obs.flatten(1)).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


elbo, optimizer = pyro.infer.Trace_ELBO(), torch.optim.Adam([*loadings.parameters(), *encoder.parameters()], lr=0.02)
for _ in range(100 if small else 1000):
    optimizer.zero_grad()
    elbo.differentiable_loss(factor_model, factor_guide, train_bits).backward()
    optimizer.step()
own = pv.log_likelihood(factor_model, bits, guide=factor_guide, estimator=sampler, device="cpu")
print(f"factor analysis of bits: {own.quantity} >= {own.mean:.2f} ± {own.mc_se:.2f} nats in {own.space}")
try:
    pv.compare({"factors": own, "VAE": results["VAE"]})
except ValueError as error:
    print(f"refused: {error}")

# %% [markdown]
# ## Samples
# What the models have learned, eight draws each; the CVAE is asked for the digits 0 to 7.

# %%
draws = []
for name, model in models.items():
    args = (data.test.obs[:8],) if name != "CVAE" else (data.test.obs[:8], torch.eye(10)[:8])
    draws.append(data.space.to_unit(pv.traces.simulate(pv.traces.as_pair(model.cpu()), args)["obs"]))
Image(pv.plots.plot_images(torch.cat(draws), "samples.png", columns=8, row_labels=list(models)))

# %% [markdown]
# ## Compare
# All models saw the same test images, so their differences are paired: the error of a difference is much smaller than
# the errors of the means suggest. Results are saved and read back digit for digit.

# %%
for name, result in results.items():
    result.save(f"{name}.npz")
results = {name: pv.LogLikelihood.load(f"{name}.npz") for name in results}
comparison = pv.compare(results, train_seconds=train_seconds)
print(comparison.table(), comparison.pairs_table(), sep="\n\n")

# %% [markdown]
# ## The answer

# %%
first = comparison.pairs[0]
shares = {name: results[name].frac_khat_high for name in (first.a, first.b)}
doubts = [f"k-hat is above 0.7 for {share:.0%} of the images under {name}" for name, share in shares.items() if share]
print(
    f"On {comparison.num_data} held-out digits, one fit of each model: {first.verdict} (by {first.difference:.2f} nats "
    f"per image, {comparison.level:.0%} interval {first.low:.2f} to {first.high:.2f} over draws of the test set"
    + "".join(f"; {doubt}" for doubt in doubts)
    + ")."
)
Image(pv.plots.plot_comparison(comparison, "comparison.png"))
