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
# # What a guide buys
#
# The ELBO of a VAE rises when the posterior family gets richer. Two things can be behind it:
#
# ELBO = log p(x) - KL(q(z | x) || p(z | x)),
#
# a better model p(x), or the same model with a tighter bound. Only the first is worth anything to whoever wants p(x).
# Here one VAE is fitted with several guides, and the gain of each is divided into the two. With the environment
# variable `PYRO_VAE_SMALL=1` all cells run in seconds.

# %%
import os

import torch
from IPython.display import Image

import pyro_vae as pv
from pyro_vae.guides import family

small = os.environ.get("PYRO_VAE_SMALL") == "1"
num_epochs, num_data, sizes = (2, 10, (1, 5, 20)) if small else (200, 200, (1, 10, 100, 1000))
best = pv.multilevel(40 if small else 500, proposal=pv.refined())
data = pv.load_data("digits", seed=0)
print("families in guides/:", ", ".join(family.listing()))
guides = ["mean_field", "full_covariance", "mixture", "inverse_autoregressive"]

# %% [markdown]
# ## One model, several guides
# Encoder, decoder, prior, seed and settings are the same. Each guide has a fit of its own, as the guide shapes what
# the decoder learns: an ELBO with a narrow family draws the model to where that family fits.

# %%
models = {}
settings = {"num_epochs": num_epochs, "batch_size": 64, "learning_rate": 3e-3, "kl_warmup": num_epochs // 10}
for guide in guides:
    torch.manual_seed(0)
    models[guide] = pv.models.VAE(data.space, latent_dim=8, hidden_dims=(200, 200), guide=guide)
    assert not pv.testing.check_pair(models[guide], data=data).failed
    history = pv.fit(models[guide], data, seed=0, **settings)
    print(
        f"{guide}: {history.status} after {history.seconds:.0f} s, validation ELBO {history.best_valid_elbo:.2f} nats"
    )

# %% [markdown]
# ## From the ELBO up
# L_K, the bound of K particles, lies between the ELBO (K = 1) and log p(x). The best estimate is the multilevel one,
# whose proposal is fitted to each image and hardly depends on the guide.

# %%
bounds = pv.compare_bounds(models, data.test.subset(num_data, seed=0), num_particles=sizes, best=best, seed=0)
print(bounds.table())

# %%
Image(pv.plot_bound_curves(bounds, "bounds.png"))

# %% [markdown]
# ## Where the gain comes from
# Differences are paired over the test images; ± is two standard errors over draws of the test set.

# %%
print(f"{'gain over mean_field':24}{'ELBO':>16}{'log p(x)':>16}{'tighter bound':>16}{f'L_{sizes[-1]}':>16}")
reference = bounds.row("mean_field").curve.bounds[-1]
for gain in bounds.gains("mean_field"):
    parts = [f"{part.mean:+.2f} ± {2 * part.se:.2f}" for part in (gain.elbo, gain.model, gain.guide)]
    last = (bounds.row(gain.name).curve.bounds[-1] - reference).mean()
    print(f"{gain.name:24}{parts[0]:>16}{parts[1]:>16}{parts[2]:>16}{last:>+16.2f}")


# %%
def verdict(part, up, down):
    if abs(part.mean) <= 2 * part.se:
        return "no difference that these images can show"
    return up if part.mean > 0 else down


top = max(bounds.gains("mean_field"), key=lambda gain: gain.elbo.mean)
print(
    f"{top.name} has the highest ELBO of the richer guides, {top.elbo.mean:+.2f} nats per image against mean_field: "
    f"{top.model.mean:+.2f} in log p(x) ({verdict(top.model, 'a better model', 'a worse model')}) and "
    f"{top.guide.mean:+.2f} in the gap ({verdict(top.guide, 'a tighter bound', 'a looser bound')}); one fit of each, "
    f"{bounds.num_data} images."
)
