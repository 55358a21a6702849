"""Checkpoints: plain dicts of tensors and numbers, written atomically, read without unpickling code."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save(path: str | Path, payload: dict[str, Any]) -> None:
    """Write `payload` to a temporary file beside `path` and move it there: a reader sees the old or the new, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
        raise ValueError(f"{path} must be a checkpoint of format {FORMAT}, found {found}")
    return payload
