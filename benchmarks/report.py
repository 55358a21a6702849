"""What the benchmarks share: a report that is saved row by row, the machine, times on a device, paired gains."""

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library beside the benchmarks

import numpy as np
import torch

import pyro_vae as pv


def machine(device: torch.device) -> dict[str, object]:
    root = Path(__file__).resolve().parents[1]
    commit, changed = (
        subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "pyro_vae", "models"))
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": f"{commit}, changed" if changed else commit or None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Report:
    """The rows so far, written anew after each."""

    def __init__(self, path: Path, header: dict[str, object]) -> None:
        self.path, self.contents = path, {**header, "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: object) -> None:
        self.contents["rows"].append(row)
        self.path.write_text(json.dumps(self.contents, indent=2, allow_nan=False) + "\n")
        print(json.dumps(row), flush=True)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its seconds."""
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - started


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def figures(result: pv.LogLikelihood) -> dict[str, object]:
    keep = ("quantity", "estimator", "num_particles", "direction", "mean_log_prob", "mc_se", "test_se", "notes")
    summary = result.summary()
    return {key: summary[key] for key in keep} | {"n": len(result), "sha256": result.digest}


def per_image(values: np.ndarray) -> str:
    """Values of single images for a report, in one line."""
    return " ".join(f"{value:.3f}" for value in values)


def paired_gain(better: str, worse: str) -> str:
    """Mean paired difference of what `per_image` gave for the same images, with its standard error over images."""
    here, there = (np.array(each.split(), dtype=float) for each in (better, worse))
    gain = here - there
    return f"{gain.mean():+.2f} ({gain.std(ddof=1) / math.sqrt(len(gain)):.2f})"
