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
# # How many latents?
#
# "Less than 4 z dimensions produced noticeably worse results. Results with 1,000 z's were good, but with 10,000 they
# were also degraded", writes Doersch (2016, arXiv:1606.05908), of what samples look like. Is it so of held-out log p?
# With `PYRO_VAE_SMALL=1` in the environment all cells run in seconds; with `PYRO_VAE_ROOT`, the folder of the MNIST
# files, the data are MNIST and not the embedded digits.

# %%
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from fewer_latents import Reduced

import pyro_vae as pv

small, root = os.environ.get("PYRO_VAE_SMALL") == "1", os.environ.get("PYRO_VAE_ROOT")
dims = (1, 2, 30) if small else (1, 2, 3, 4, 8, 16, 50, 200, 1000, 10_000)
width, num_epochs, num_images = (10, 2, 10) if small else (200, 30, 100)
whole = (
    pv.load_data("digits", space="binary", seed=0) if small or not root else pv.load_data("mnist", root=root, seed=0)
)
some = torch.randperm(len(whole.train), generator=torch.Generator().manual_seed(0))[:10_000]
data = replace(
    whole,
    train=pv.Batch(whole.train.obs[some], space=whole.space),
    intensity=None if whole.intensity is None else whole.intensity[some],
    valid=whole.valid.subset(min(2000, len(whole.valid))),
)
images = data.test.subset(num_images, seed=0)
print(f"{data.name} in {data.space}: {len(data.train)} train, {len(data.valid)} valid, {num_images} test images")

# %% [markdown]
# ## The fits
# Networks, seed, batches and epochs are the same; the number of latents alone differs.

# %%
models, seconds = {}, {}
settings = {"num_epochs": num_epochs, "batch_size": 100, "learning_rate": 2e-3, "validate_every": 5}
for latent_dim in dims:
    torch.manual_seed(0)
    models[latent_dim] = pv.models.VAE(data.space, latent_dim=latent_dim, hidden_dims=(width, width))
    history = pv.fit(models[latent_dim], data, seed=0, **settings)
    seconds[latent_dim] = history.seconds
    print(
        f"{latent_dim:>6,} latents: {history.seconds:4.0f} s, validation ELBO {history.best_valid_elbo:8.2f}",
        flush=True,
    )

# %% [markdown]
# ## 10,000 latents are 200
# No estimator is at ease in 10,000 dimensions, and none has to be. The decoder's first layer sees z as W z alone, as
# many numbers as it has units. With W' = Q R, Q'Q = I, this is R'u with u = Q'z, and u is N(0, I) as z is: the same
# p(x) with no more latents than the layer has units. If z is N(m, diag(s²)) given x, then u is N(Q'm, Q' diag(s²) Q).
# The pair of u is `Reduced`, in fewer_latents.py beside this file.


# %%
def programs(vae):
    pair = vae if vae.latent_dim <= width else Reduced(vae)
    return pair.model, pair.guide


# %% [markdown]
# ## Held-out log p(x)
# Importance sampling from a Gaussian with full covariance fitted to each image: a lower bound in expectation. Where
# k-hat is above its limit its error must not be trusted, and a warning says so.

# %%
estimator = pv.importance_sampling(100 if small else 1000, proposal=pv.refined(10 if small else 100))
results, elbos, use = {}, {}, {}
for latent_dim, vae in models.items():
    vae.eval().requires_grad_(False)
    model, guide = programs(vae)
    results[latent_dim] = pv.log_likelihood(model, images, guide=guide, estimator=estimator, seed=0, device="cpu")
    use[latent_dim] = pv.latent_use(vae, images, num_particles=4, seed=0)
    elbos[latent_dim] = use[latent_dim].elbo.mean
    each = results[latent_dim]
    print(
        f"{latent_dim:>6,} latents: log p(x) >= {each.mean:.2f} (MC SE {each.mc_se:.3f}, test SE {each.test_se:.2f}), "
        f"ELBO {elbos[latent_dim]:.2f}, KL {use[latent_dim].kl.mean:.2f}, {use[latent_dim].num_active} active units; "
        f"k-hat > 0.7: {each.frac_khat_high:.0%}; warning: {each.warning}",
        flush=True,
    )

# %% [markdown]
# ## 1,000 latents from both sides
# Whether 1,000 latents are fine must not hang on a lower bound whose error is in doubt. Annealing from the guide, on
# the VAE as it is, goes further; its certificate bounds, on data simulated from the model, how far it is short.

# %%
many, most = dims[-2:]
num_steps = 5 if small else 200
certified = pv.sandwich(num_steps=num_steps, num_simulated=2 if small else 30)
checked = pv.log_likelihood(models[many], images, estimator=certified, seed=0, device="cpu")
short, certificate = checked.mean - results[many].mean, checked.certificate
print(
    f"{many:>6,} latents by annealing: log p(x) >= {checked.mean:.2f} (MC SE {checked.mc_se:.3f}), {short:+.2f} to "
    f"importance sampling; gap on simulated data {certificate.gap:.2f} (SE {certificate.gap_se:.2f}); "
    f"warning: {checked.warning}"
)

# %% [markdown]
# ## Who is better than whom
# Differences are paired over the images, and the intervals of all pairs hold at once. All rows are importance sampling:
# a better estimate of one of them alone would take sides.

# %%
name = {latent_dim: f"{latent_dim:,} latents" for latent_dim in dims}
comparison = pv.compare({name[latent_dim]: result for latent_dim, result in results.items()})
print(comparison.table(), comparison.pairs_table(), sep="\n\n")

# %% [markdown]
# ## The picture and the answer
# log p(x) with 95% intervals over draws of the test set; the ELBO below it; units whose mean moves with the image
# (variance above 0.01).

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
intervals = [results[latent_dim].population_interval() for latent_dim in dims]
means = np.array([results[latent_dim].mean for latent_dim in dims])
ends = np.array([[m - each.low, each.high - m] for m, each in zip(means, intervals, strict=True)]).T
axes[0].errorbar(dims, means, ends, marker="o", markersize=4, capsize=3, label="log p(x), at least")
axes[0].plot(dims, list(elbos.values()), marker="s", markersize=4, linestyle="--", label="ELBO")
axes[0].set(xlabel="latents", ylabel="nats per image, mean over the test images", xscale="log")
axes[0].legend()
axes[1].plot(dims, [use[latent_dim].num_active for latent_dim in dims], marker="o", markersize=4, label="active units")
axes[1].plot(dims, dims, color="0.6", linestyle=":", label="as many as there are")
axes[1].set(xlabel="latents", ylabel="active units", xscale="log", yscale="symlog", ylim=(0, 2 * dims[-1]))
axes[1].legend()
plt.show()


# %%
def against(a, b):
    """Log p(x) with a latents less that with b, with its interval, and what it allows one to say."""
    pair = next(each for each in comparison.pairs if {each.a, each.b} == {name[a], name[b]})
    sign = 1 if pair.a == name[a] else -1
    low, high = sorted((sign * pair.low, sign * pair.high))
    verdict = ("worse" if sign < 0 else "better") if pair.told_apart else "no difference that these images can show"
    doubt = "" if pair.is_sure else ", as estimated"
    return f"{sign * pair.difference:+.2f} nats [{low:.2f}, {high:.2f}]: {verdict}{doubt}"


best = max(dims, key=lambda latent_dim: results[latent_dim].mean)
few = max(latent_dim for latent_dim in dims if latent_dim < 4)
doubts = [name[latent_dim] for latent_dim, result in results.items() if result.warning]
print(
    f"On {num_images} test images of {data.name}, one fit of each size, the highest log p(x) is that of {name[best]}; "
    + "; ".join(f"{name[d]} against these {against(d, best)}" for d in (few, many, most) if d != best)
    + f"; {name[most]} against {name[many]} {against(most, many)}, with {use[most].num_active} active units of "
    f"{most:,}"
    + (f" (errors not to be trusted for {', '.join(doubts)})" if doubts else "")
    + f"; annealing, {'certified' if certificate.granted else 'without a certificate'}, moves {name[many]} by "
    f"{short:+.2f} nats."
)
