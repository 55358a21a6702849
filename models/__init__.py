"""Probabilistic models, one file and one class each: a Pyro model/guide pair that reads like the math.

The folder listing is the registry: a new file with one public class is a new model, here and on the command line.
"""

import ast
import importlib
from functools import cache
from pathlib import Path


@cache
def listing() -> dict[str, str]:
    """The models of this folder, {file name: class name}, read from the sources without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
        if len(classes) != 1:
            raise ImportError(f"{path.name} must hold exactly one public class, found {classes}")
        found[path.stem] = classes[0]
    return found


def __getattr__(name: str) -> type:
    for stem, class_name in listing().items():
        if class_name == name:
            return getattr(importlib.import_module(f"{__name__}.{stem}"), name)
    raise AttributeError(f"no model {name!r}; there are {', '.join(listing().values())}")


def __dir__() -> list[str]:
    return ["listing", *listing().values()]
