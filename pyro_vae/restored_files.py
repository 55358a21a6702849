"""What `pyro-vae restore` reads and writes: masks, images as they were seen, draws and their figures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import scoring
from pyro_vae.data import Batch
from pyro_vae.masks import NAMES, named, share_of
from pyro_vae.randomness import derived_seed
from pyro_vae.restoration.corruption import Noise
from pyro_vae.restoration.task import Restoration
from pyro_vae.rows import finite
from pyro_vae.runs import Run
from pyro_vae.spaces import Binary, Quadrants, Real

NOISE = 71  # stream of the seed


def read_mask(text: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """True where a pixel is missing: a name ("top_left"), a share ("0.5", seeded), or an .npy file of 0 and 1."""
    if text in NAMES:
        return named(text, shape)
    if text.endswith(".npy"):
        mask = np.load(text, allow_pickle=False)
        if mask.shape != shape or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{text} must hold 0 and 1 of shape {shape}, found {mask.dtype} of shape {mask.shape}")
        return torch.from_numpy(mask.astype(bool))
    try:
        share = float(text)
    except ValueError as error:
        raise ValueError(f"missing must be one of {', '.join(NAMES)}, a share or an .npy file, got {text!r}") from error
    return share_of(share, shape, seed)


def images_of(
    run: Run, path: Path | None, num_data: int | None, noise: float | None, seed: int
) -> tuple[Tensor | None, Batch]:
    """The true images, if they are known, and the whole images as they were seen.

    Test data of the run are the truth and get the noise asked for; images of the user's own are as they were seen. A
    run that is given quadrants is shown whole images.
    """
    if isinstance(run.data.context, Quadrants):
        run = replace(run, data=replace(run.config, given=None).load_data())
    if path is not None:
        return None, scoring.read_batch(path, run)
    batch = run.data.test if num_data is None else run.data.test.subset(num_data, seed)
    batch = replace(batch, obs=batch.obs[:])
    if noise is None:
        return batch.obs, batch
    if not isinstance(run.data.space, Binary | Real):
        raise ValueError(f"noise is for real pixels (a standard deviation) and bits (P(flip)), not {run.data.space}")
    generator = torch.Generator().manual_seed(derived_seed(seed, NOISE))
    noisy = Noise(noise).applied(batch.obs, isinstance(run.data.space, Binary), generator)
    return batch.obs, replace(batch, obs=noisy)


def save(found: Restoration, seen: Batch, truth: Tensor | None, folder: Path) -> list[Path]:
    """Images as restored.npz, figures as restored.json, log p per image as restored_log_prob.npz."""
    arrays: dict[str, Any] = {"seen": seen.obs.numpy(), "mean": found.mean.numpy(), "draws": found.draws.numpy()}
    arrays |= {} if found.missing is None else {"missing": found.missing.numpy()}
    arrays |= {} if truth is None else {"truth": truth.numpy()}
    arrays |= {name: each for name in ("ess", "khat") if (each := getattr(found, name)) is not None}
    np.savez(folder / "restored.npz", **arrays)
    figures = {"how": found.how, "num_data": len(seen), "num_draws": len(found.draws), **errors(found, truth)}
    if found.log_prob is not None:
        figures["log_prob"] = finite(found.log_prob.summary())
        found.log_prob.save(folder / "restored_log_prob.npz")
    text = json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "restored.json").write_text(text + "\n", encoding="utf-8")
    paths = [folder / "restored.npz", folder / "restored.json"]
    return paths if found.log_prob is None else [*paths, folder / "restored_log_prob.npz"]


def errors(found: Restoration, truth: Tensor | None) -> dict[str, object]:
    """Root mean squared error of the posterior mean over the pixels that were restored, in units of the data."""
    if truth is None:
        return {}
    offset = (found.mean - truth).double()
    offset = offset if found.missing is None else offset[:, found.missing]
    return {"rmse_of_mean": float(offset.square().mean().sqrt())}
