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
# # What are the codes of an autoencoder good for, and what are they not?
#
# An autoencoder gives each image a code and rebuilds the image from it with the least squared error. Two things are
# said of it: that its codes have no meaning, as nothing asks neighbours to be alike, and that nothing new can be drawn
# from it, as its codes have no law. Beside it stand a VAE with the same networks, whose codes have the law N(0, I), and
# probabilistic PCA, a straight line in place of the networks. All see the same bits: 8x8 digits of scikit-learn, one
# draw of black and white pixels. With the environment variable `PYRO_VAE_SMALL=1` the fits are short.

# %%
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image

import pyro_vae as pv

small = os.environ.get("PYRO_VAE_SMALL") == "1"
num_epochs, num_draws, latent_dim = (3, 50, 10) if small else (100, 2000, 10)
data = pv.load_data("digits", space="binary", binarization="static", seed=0)
if small:
    data = replace(data, train=data.train.subset(300, 0), test=data.test.subset(100, 0))
parts = (data.train, data.valid, data.test)
line = pv.Real(data.space.shape)  # the same bits as real numbers, for PPCA
bits_as_numbers = pv.Data("digits", line, *(pv.Batch(part.obs, labels=part.labels, space=line) for part in parts))
print(f"{data.space}: {len(data.train)} train, {len(data.valid)} valid, {len(data.test)} test images")

# %% [markdown]
# ## Fit
# A mixture of Bernoulli images, fitted to the same training images, will be the judge of what is drawn: its log p(x) is
# exact, and it knows none of the codes.

# %%
torch.manual_seed(0)
net = {"latent_dim": latent_dim, "hidden_dims": (200, 200)}
autoencoder, vae = pv.models.Autoencoder(data.space, **net), pv.models.VAE(data.space, **net)
ppca, judge = (
    pv.models.PPCA(line, latent_dim=latent_dim),
    pv.models.BernoulliMixture(data.space, num_components=5 if small else 20),
)
errors = pv.fit(autoencoder, data, seed=0, num_epochs=num_epochs)
elbo = pv.fit(vae, data, seed=0, num_epochs=num_epochs, batch_size=64, learning_rate=3e-3, kl_warmup=num_epochs // 5)
pv.fit(ppca, bits_as_numbers)
pv.fit(judge, data, seed=0)
for name, history in {"autoencoder": errors, "VAE": elbo}.items():
    print(f"{name}: best epoch {history.best_epoch} of {len(history.rows)}, {history.seconds:.0f} s")
try:
    pv.log_likelihood(autoencoder, data.test)
except ValueError as error:
    print(f"refused: {error}")


# %% [markdown]
# ## Codes
# `pv.features` gives the code of each image: e(x) of the autoencoder, the mean of q(z | x) of the VAE, the posterior
# mean of PPCA. Does a code tell the digit? By a linear classifier (fitted on training images, its strength chosen on
# validation images), and by the digit of the nearest training image in code space.


# %%
def share_of_neighbours(codes):
    """Share of the test images whose nearest training image has their label, and these neighbours."""
    nearest = torch.cdist(codes[2].flatten(1), codes[0].flatten(1)).argmin(1)
    return float((data.train.labels[nearest] == data.test.labels).double().mean()), nearest


fitted = {"autoencoder": (autoencoder, data), "VAE": (vae, data), "PPCA": (ppca, bits_as_numbers)}
codes = {
    name: [pv.features(model, part, device="cpu") for part in (its.train, its.valid, its.test)]
    for name, (model, its) in fitted.items()
}
looked_at = {**codes, "pixels": [part.obs for part in parts]}
probes = {name: pv.linear_probe(each, [part.labels for part in parts]) for name, each in looked_at.items()}
neighbours = {name: share_of_neighbours(each) for name, each in looked_at.items()}
for name, probe in probes.items():
    print(f"{name:12s} {probe}, neighbour of the same digit {neighbours[name][0]:.3f}")
for pair in pv.compare_probes(probes):
    print(
        f"{pair.a} - {pair.b}: {pair.difference:+.3f}, alone right {pair.only_a} : {pair.only_b}, p {pair.adjusted:.2g}"
    )

# %% [markdown]
# Test images, and the training image whose code is nearest.

# %%
some = torch.arange(0, len(data.test), max(1, len(data.test) // 12))[:12]
rows = [data.test.obs[some], *(data.train.obs[neighbours[name][1][some]] for name in looked_at)]
Image(pv.plots.plot_images(torch.cat(rows), "neighbours.png", columns=12, row_labels=["test image", *looked_at]))

# %% [markdown]
# ## Between two images
# The straight line between the codes of two test images of different digits, decoded: pixels that are probabilities,
# those of PPCA cut to [0, 1]. The last row mixes the two images themselves.


# %%
@torch.no_grad()
def decode(name, code):
    """P(pixel = 1) of each code, (n, 8, 8)."""
    if name == "PPCA":
        return (ppca.loc + code @ ppca.loadings.T).clamp(0, 1).reshape(-1, *data.space.shape)
    return autoencoder.decode(code) if name == "autoencoder" else vae.decoder(code).squeeze(1).sigmoid()


first, second = (int((data.test.labels == digit).nonzero()[0]) for digit in (0, 4))
steps = torch.linspace(0, 1, 9)[:, None]
ways = [decode(name, (1 - steps) * code[2][first] + steps * code[2][second]) for name, code in codes.items()]
ends = data.test.obs[[first, second]]
ways.append((1 - steps[:, :, None]) * ends[0] + steps[:, :, None] * ends[1])
Image(pv.plots.plot_images(torch.cat(ways), "between.png", columns=9, row_labels=[*codes, "pixels"]))

# %% [markdown]
# ## Codes drawn at random
# Three kinds of codes: those of the test images; draws of a Gaussian with the mean and the covariance of the training
# codes; draws of N(0, I), which is the law that VAE and PPCA were built with and nothing to the autoencoder. Each code
# is decoded, bits are drawn from the probabilities, and the judge gives their log p(x) in nats. What it says of the
# test images themselves is the mark to reach. It may be passed by images that are more alike than digits are, and it
# does not see whether the draws are of all digits.


# %%
def draw(name, kind, generator):
    """Codes of one kind, (num_draws, latent_dim)."""
    train, _, test = codes[name]
    noise = torch.randn(num_draws, latent_dim, generator=generator)
    if kind == "codes of test images":
        return test[torch.randint(len(test), (num_draws,), generator=generator)]
    if kind == "Gaussian fitted to codes":
        return train.mean(0) + noise @ torch.linalg.cholesky(train.T.cov()).T
    return noise


def judged(obs):
    """Mean log p(x) under the judge, and half of its 95% interval."""
    log_prob = pv.log_likelihood(judge, pv.Batch(obs, space=data.space), estimator=pv.exact(), device="cpu").log_prob
    return float(log_prob.mean()), 1.96 * float(log_prob.std(ddof=1)) / np.sqrt(len(log_prob))


kinds = ("codes of test images", "Gaussian fitted to codes", "N(0, I)")
mark, pictures, scores = judged(data.test.obs), {}, {}
for name in codes:
    for kind in kinds:
        generator = torch.Generator().manual_seed(0)
        pictures[name, kind] = decode(name, draw(name, kind, generator))
        scores[name, kind] = judged(torch.bernoulli(pictures[name, kind], generator=generator))
        print(f"{name:12s} {kind:26s} {scores[name, kind][0]:8.2f} ± {scores[name, kind][1]:.2f} nats")
print(f"test images themselves                  {mark[0]:8.2f} ± {mark[1]:.2f} nats")
print(f"standard deviation of the codes: {', '.join(f'{name} {code[0].std():.2f}' for name, code in codes.items())}")

# %% [markdown]
# ## The answer

# %%
figure, axes = plt.subplot_mosaic(
    [[f"{name}{kind}" for kind in kinds[1:]] + ["scores"] for name in codes],
    figsize=(12, 4.6),
    width_ratios=(1, 1, 0.9),
    layout="constrained",
)
for name in codes:
    for kind in kinds[1:]:
        framed = torch.nn.functional.pad(pictures[name, kind][:24], (1, 1, 1, 1), value=0.5)
        grid = framed.reshape(3, 8, 10, 10).permute(0, 2, 1, 3).reshape(30, 80)
        axes[f"{name}{kind}"].imshow(grid, cmap="gray", vmin=0, vmax=1)
        axes[f"{name}{kind}"].set(xticks=[], yticks=[], title=kind if name == "autoencoder" else "")
    axes[f"{name}{kinds[1]}"].set_ylabel(name)
ax = axes["scores"]
for shift, (kind, colour) in enumerate(zip(kinds, ("0.5", "tab:blue", "tab:orange"), strict=True)):
    means, arms = zip(*(scores[name, kind] for name in codes), strict=True)
    ax.errorbar(means, np.arange(3) + 0.2 * (shift - 1), xerr=arms, fmt="o", color=colour, label=kind)
ax.axvspan(mark[0] - mark[1], mark[0] + mark[1], color="tab:green", alpha=0.3, label="test images")
ax.set(
    yticks=range(3), yticklabels=list(codes), ylim=(2.5, -0.5), xlabel="log p(x) under the judge (nats), 95% interval"
)
ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=2, fontsize=8)
plt.show()
lost = {key: score - mark[0] for key, (score, _) in scores.items()}
ranking = sorted(codes, key=lambda name: -lost[name, "N(0, I)"])
drawn = ", ".join(f"{lost[name, 'N(0, I)']:+.1f} ({name})" for name in ranking)
refitted = ", ".join(f"{lost[name, kinds[1]]:+.1f} ({name})" for name in ranking)
read = ", ".join(f"{probes[name].accuracy:.0%} ({name})" for name in looked_at)
print(
    f"On {len(data.test)} test digits, a linear classifier reads the digit off {latent_dim} numbers in {read} of the "
    f"cases; images decoded from N(0, I) codes have {drawn} nats against real ones under the judge, and from a "
    f"Gaussian fitted to the training codes {refitted}: one fit of each model."
)
