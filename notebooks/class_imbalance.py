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
# # One class has 1% of its images: do samples of a CVAE help?
#
# A class that is rare in the training data is often missed. It can be copied (random oversampling), its errors can be
# weighted (class weights), or new images of it can be drawn from a conditional VAE that was fitted to the same
# imbalanced data. Which finds more of the rare class in a balanced test set, and at what price? With `PYRO_VAE_SMALL=1`
# in the environment all cells run in seconds; with `PYRO_VAE_ROOT`, the folder of the MNIST files, the data are MNIST.
# Without it they are the embedded digits, whose classes are so small that a twentieth is left and not a hundredth.

# %%
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score

import pyro_vae as pv

small, root = os.environ.get("PYRO_VAE_SMALL") == "1", os.environ.get("PYRO_VAE_ROOT")
RARE = 8
if small or not root:
    whole, share, per_class = pv.load_data("digits", space="binary", seed=0), 0.05, 120
else:
    whole, share, per_class = pv.load_data("mnist", root=root, seed=0), 0.01, 2000
num_seeds, num_epochs = (2, 2) if small else (5, 30)
num_rare = round(share * per_class)
print(f"{whole.name}: {per_class:,} training images of each class, and {num_rare} of the digit {RARE} ({share:.0%})")

# %% [markdown]
# ## The data of one seed
# A seed draws which images there are. Validation data are cut by the same share: nobody sees more of the rare class.


# %%
def cut(batch, per_class, num_rare, seed):
    """Indexes of `per_class` images of each class (or all there are), and `num_rare` of the rare one."""
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    labels = batch.labels[order]
    chosen = [order[labels == c][: num_rare if c == RARE else per_class] for c in range(10)]
    return torch.cat(chosen)


def part(batch, chosen):
    return pv.Batch(batch.obs[chosen], labels=batch.labels[chosen], space=whole.space)


def imbalanced(seed):
    train = cut(whole.train, per_class, num_rare, seed)
    valid = cut(whole.valid, 200, max(1, round(share * 200)), seed)
    intensity = None if whole.intensity is None else whole.intensity[train]
    return replace(whole, train=part(whole.train, train), valid=part(whole.valid, valid), intensity=intensity)


# %% [markdown]
# ## Four ways
# The classifier is logistic regression on the bits. Copies and samples fill the rare class up to the others' size.


# %%
def sampled(data, num, seed):
    """Images of the rare class from a CVAE that was fitted to `data`."""
    given = data.given("label")
    torch.manual_seed(seed)
    cvae = pv.models.CVAE(data.space, given.context, latent_dim=16, hidden_dims=(200, 200))
    pv.fit(cvae, given, seed=seed, num_epochs=num_epochs, batch_size=128, learning_rate=2e-3, validate_every=5)
    label = torch.eye(10)[[RARE]].expand(num, 10)
    torch.manual_seed(seed)
    return pv.traces.simulate(pv.traces.as_pair(cvae), (data.test.obs[:1].expand(num, -1, -1), label))["obs"].detach()


def training_sets(data, seed):
    """Images, labels and class weights of each way."""
    obs, labels = data.train.obs, data.train.labels
    rare, num = obs[labels == RARE], per_class - num_rare
    copies = torch.randint(len(rare), (num,), generator=torch.Generator().manual_seed(seed))
    filled = torch.cat([labels, torch.full((num,), RARE)])
    yield "nothing", obs, labels, None
    yield "class weights", obs, labels, "balanced"
    yield "oversampling", torch.cat([obs, rare[copies]]), filled, None
    yield "CVAE samples", torch.cat([obs, sampled(data, num, seed)]), filled, None


# %%
scores, pictures = {}, {}
for seed in range(num_seeds):
    data = imbalanced(seed)
    test, truth = data.test.obs.flatten(1).numpy(), data.test.labels.numpy()
    for way, obs, labels, weights in training_sets(data, seed):
        classifier = LogisticRegression(C=0.1, class_weight=weights, max_iter=1000, tol=1e-3)
        found = classifier.fit(obs.flatten(1).numpy(), labels.numpy()).predict(test)
        is_rare = truth == RARE, found == RARE
        scores.setdefault(way, []).append(
            (recall_score(*is_rare), precision_score(*is_rare, zero_division=0), balanced_accuracy_score(truth, found))
        )
        pictures[way] = obs[-5:]
    pictures["training images"] = data.train.obs[data.train.labels == RARE][:5]
    print(f"seed {seed}:", *(f"{way} {values[-1][0]:.3f}" for way, values in scores.items()), sep="  ", flush=True)
scores = {way: np.array(values) for way, values in scores.items()}  # (seeds, 3)

# %% [markdown]
# ## Over the seeds
# Means with 95% t intervals over the seeds, which differ in the images, in the copies and in the fit and the samples of
# the CVAE; differences are paired by seed. The test set is the same throughout.

# %%
metrics = (f"recall of {RARE}", f"precision of {RARE}", "balanced accuracy")


def interval(values):
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), half


for column, metric in enumerate(metrics):
    print(f"\n{metric:24}{'mean':>18}{'less nothing':>20}{'CVAE samples less it':>24}")
    for way, values in scores.items():
        against = values[:, column] - scores["nothing"][:, column], (scores["CVAE samples"] - values)[:, column]
        cells = [interval(each) for each in (values[:, column], *against)]
        print(f"{way:24}" + "".join(f"{m:+{w}.3f} ± {h:.3f}" for (m, h), w in zip(cells, (10, 12, 16), strict=True)))

# %% [markdown]
# ## The picture and the answer

# %%
figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained", width_ratios=(1, 1, 1, 1.1))
for column, (metric, ax) in enumerate(zip(metrics, axes, strict=False)):
    for place, values in enumerate(scores.values()):
        mean, half = interval(values[:, column])
        ax.plot(np.full(num_seeds, place), values[:, column], ".", color="0.6", zorder=1)
        ax.errorbar(place + 0.15, mean, half, marker="o", capsize=4, color=f"C{place}")
    ax.set_xticks(range(len(scores)), list(scores), rotation=25, ha="right")
    ax.set(title=metric, xlim=(-0.5, len(scores) - 0.3))
axes[0].set_ylabel(f"share; mean and 95% interval over {num_seeds} seeds")
framed = {kind: torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5) for kind, images in pictures.items()}
rows = [torch.cat(list(framed[kind]), 1) for kind in ("training images", "CVAE samples")]
axes[3].imshow(torch.cat(rows).numpy(), cmap="gray_r")
axes[3].set(title=f"above: training images of {RARE}\nbelow: CVAE samples", xticks=[], yticks=[])
plt.show()


# %%
def verdict(mean, half):
    return "no difference that these seeds can show" if abs(mean) <= half else "more" if mean > 0 else "fewer"


recalls = {way: values[:, 0] for way, values in scores.items()}
best = max(recalls, key=lambda way: recalls[way].mean())
said = []
for other in ("nothing", "class weights", "oversampling"):
    mean, half = interval(recalls["CVAE samples"] - recalls[other])
    said.append(f"against {other} {mean:+.3f} ± {half:.3f} ({verdict(mean, half)})")
print(
    f"With {num_rare} images of the digit {RARE} beside {per_class:,} of each other class, {best} had the highest mean "
    f"recall of it over {num_seeds} seeds, {recalls[best].mean():.3f}; CVAE samples had "
    f"{recalls['CVAE samples'].mean():.3f}: " + ", ".join(said) + "; 95% t intervals of paired differences."
)
