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
# # Why not average p(x | z) over draws from the prior?
#
# p(x) = E p(x | z) with z from p(z), so that p(x) ≈ 1/K Σ_k p(x | z_k), z_k ~ p(z), is right on average, for any K and
# any model. Yet "for most z, P(x | z) will be nearly zero", as Doersch writes (2016, arXiv:1606.05908). How short is
# log p(x) after how many draws, and what does a guide buy? With `PYRO_VAE_SMALL=1` in the
# environment all cells run in seconds.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch

import pyro_vae as pv

small = os.environ.get("PYRO_VAE_SMALL") == "1"
num_epochs, num_images, sizes = (3, 8, (1, 10, 100, 1000)) if small else (200, 50, (1, 10, 100, 1000, 10_000, 100_000))
num_steps = (2, 4) if small else (4, 16, 64)
data = pv.load_data("digits", space="binary", seed=0)
images = data.test.subset(num_images, seed=0)
print(f"{data.space} of shape {data.space.shape}: {len(data.train)} training images, {num_images} test images")

# %% [markdown]
# ## One model, two proposals
# The mean over draws from the prior is importance sampling with the prior as the guide: the weights are
# p(x, z)/p(z) = p(x | z). So it is a Pyro pair like any other, and has the diagnostics of one.

# %%
torch.manual_seed(0)
vae = pv.models.VAE(data.space, latent_dim=16, hidden_dims=(100, 100))
history = pv.fit(vae, data, seed=0, num_epochs=num_epochs, batch_size=64, learning_rate=3e-3)
print(f"VAE: {history.status} after {history.seconds:.0f} s, validation ELBO {history.best_valid_elbo:.2f} nats")


def prior_guide(obs):
    with pyro.plate("data", len(obs), dim=-1):
        pyro.sample("z", vae.prior())


# %% [markdown]
# ## What is right?
# The reference is the multilevel estimate with a Gaussian fitted to each image as proposal, certified from both sides:
# images drawn from the model itself come with an exact draw of their z, from which annealing backwards bounds log p(x)
# from above (bidirectional Monte Carlo).

# %%
multilevel = pv.multilevel(50 if small else 500, proposal=pv.refined(10 if small else 100))
certified = pv.sandwich(multilevel, num_steps=4 if small else 50, num_simulated=4 if small else 50)
reference = pv.log_likelihood(vae, images, estimator=certified, seed=0)
certificate = reference.certificate
print(
    f"log p(x) {reference.mean:.3f} ± {1.96 * reference.mc_se:.3f} nats for these images, "
    f"warning: {reference.warning}\n"
    f"certificate: {certificate.reason}; gap {certificate.gap:.3f} nats (SE {certificate.gap_se:.3f})"
)

# %% [markdown]
# ## Over the number of draws
# L_K of one stream of draws per image, for the prior and for the guide q(z | x). Annealing from the prior looks at the
# model once in each of its leapfrog steps, in every chain; that count is its place on the axis.

# %%
pairs = {"prior": (vae, prior_guide), "guide": vae}
bounds = pv.compare_bounds(pairs, images, num_particles=sizes, best=pv.importance_sampling(sizes[-1]), seed=0)
annealed = {}
for steps in num_steps:
    estimator = pv.annealed_importance_sampling(steps, start="prior")
    result = pv.log_likelihood(vae, images, estimator=estimator, seed=0)
    annealed[estimator.num_chains * estimator.num_steps * estimator.num_leapfrog] = result
    print(f"annealing from the prior, {steps} steps: {result.mean:.3f} nats ({result.seconds:.0f} s)")

# %% [markdown]
# How short each falls of the reference, nats per image: the mean of the paired differences, with a 95% interval over
# draws of the images, Monte Carlo errors included.


# %%
def shortfall(log_prob):
    difference = reference.log_prob - log_prob
    return difference.mean(), 1.96 * difference.std(ddof=1) / np.sqrt(num_images)


curves = {}
for row, name in zip(bounds.rows, ("draws from the prior", "draws from the guide"), strict=True):
    curves[name] = {size: shortfall(bound) for size, bound in zip(sizes, row.curve.bounds, strict=True)}
curves["annealing from the prior"] = {size: shortfall(result.log_prob) for size, result in annealed.items()}
for name, curve in curves.items():
    print(f"{name:26}", *(f"{size:,}: {mean:.2f} ± {half:.2f}" for size, (mean, half) in curve.items()), sep="  ")

# %% [markdown]
# ## Why
# How many of an image's draws carry 90% of the sum of its weights? And how many would it take? About as many as the
# exponential of KL(p(z | x) || p(z)) (Chatterjee, Diaconis 2018, arXiv:1511.01437); q(z | x) stands in for p(z | x).

# %%
carriers = {}
for name, guide in {"prior": prior_guide, "guide": None}.items():
    pair, counts = pv.traces.as_pair(vae, guide), []
    for index in range(num_images):
        torch.manual_seed(index)
        with torch.no_grad():
            weights = pv.traces.log_weights(pair, (images.obs[index : index + 1],), sizes[-1])[:, 0].softmax(0)
        counts.append(1 + int((weights.sort(descending=True).values.cumsum(0) < 0.9).sum()))
    carriers[name] = np.array(counts)
    sampled = bounds.row(name).sampled
    print(
        f"{name}: {np.median(counts):,.0f} of {sizes[-1]:,} draws carry 90% of the sum (median of the images), "
        f"ESS {np.median(sampled.ess):,.1f}; warning: {sampled.warning}"
    )
kl = pv.latent_use(vae, images, seed=0).kl.mean
print(f"KL(q(z | x) || p(z)) is {kl:.1f} nats on average, and exp({kl:.1f}) is {np.exp(kl):,.0f} draws")

# %% [markdown]
# ## The picture and the answer

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
for (name, curve), marker in zip(curves.items(), "osD", strict=True):
    mean, half = np.array(list(curve.values())).T
    axes[0].errorbar(list(curve), mean, half, marker=marker, markersize=4, capsize=3, label=name)
axes[0].axhline(0, color="0.4", linewidth=0.8)
axes[0].set(xscale="log", xlabel="evaluations of the model per image")
axes[0].set_yscale("symlog", linthresh=0.1)
axes[0].set_ylabel("short of the reference (nats per image)\n95% over draws of the images, paired")
axes[0].legend()
bins = np.geomspace(1, sizes[-1], 31)
for name, color in zip(carriers, ("C0", "C1"), strict=True):
    axes[1].hist(carriers[name], bins, color=color, alpha=0.7, label=f"draws from the {name}")
axes[1].set(xscale="log", xlabel=f"how many of {sizes[-1]:,} draws carry 90% of the sum", ylabel="images")
axes[1].legend()
plt.show()


# %%
few = sizes[min(2, len(sizes) - 1)]
prior, guide = ({size: f"{mean:.2f} ± {half:.2f}" for size, (mean, half) in curves[f"draws from the {name}"].items()}
                for name in ("prior", "guide"))  # fmt: skip
evaluations, (rest, rest_half) = list(annealed)[-1], list(curves["annealing from the prior"].values())[-1]
trusted = "is certified" if certificate.granted and not reference.warning else "has no certificate"
print(
    f"With {few:,} draws from the prior log p(x) of these {num_images} digits comes out {prior[few]} nats short of the "
    f"reference, which {trusted} (gap {certificate.gap:.2f} nats), and with as many from the guide {guide[few]}; with "
    f"{sizes[-1]:,} from the prior it is {prior[sizes[-1]]}, and a median of {np.median(carriers['prior']):,.0f} draws "
    f"carry 90% of the sum; annealing from the prior over {evaluations:,} evaluations is {rest:.2f} ± {rest_half:.2f} "
    "nats short (one fit)."
)
