"""Imports go down only, and what is heavy is imported only where it is used."""

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # a file imports its own layer and those above it in this list
    {"kernels", "kept", "graphs"},
    {"checks", "distributions", "independent", "networks", "resnet", "diagnostics", "randomness", "intervals"},
    {"annealing"},
    {"adversarial", "noise_scale", "kernel_density"},
    {"masks", "uses", "conformal", "roc"},
    {"k_means", "em_pass", "stepwise_em", "em", "normal_em", "grey_em", "binary_em"},
    {"spaces", "distributed", "mapped", "gibbs_with_gradients"},
    {"sources", "datasets", "data", "traces", "latents"},
    {"guides", "chain_rule", "log_partition", "contrastive", "minibatches", "spherical"},
    {"energy"},
    {"priors"},
    {"models"},
    {"estimators"},
    {"normalisation", "pair_checks", "pair_runs", "testing"},
    {"history", "particles", "objectives", "settings", "schedules"},
    {"compiled", "rows", "pairs", "tables"},
    {"svi", "parallel", "fitting", "checkpoint", "comparison", "bound_rows", "bound_tables", "bounds"},
    {"usage", "decoding"},
    {"codes", "probe", "restoration", "traversal", "scores"},
    {"plots", "plot_bounds", "plot_latents", "arviz", "plugins", "configuration", "runs"},
    {"recipes", "study", "pictures", "scoring", "plot_uses"},
    {"restored_files"},
    {"options"},
    {"cli_uses", "cli_restored"},
    {"cli"},
    {"__main__"},
]
FOR_MODELS = {"distributions", "networks", "guides", "priors", "spaces", "em", "em_pass", "normal_em", "traces"} | {
    "grey_em",
    "binary_em",
    "chain_rule",
    "annealing",
    "data",
    "energy",
    "checks",
    "gibbs_with_gradients",
    "minibatches",
    "adversarial",
    "noise_scale",
    "randomness",
    "spherical",
}
CLI = ("cli", "cli_uses", "cli_restored")  # the files that print
HEAVY = ("torch", "pyro", "arviz", "matplotlib", "sklearn", "torchvision")


def name_of(path):
    """Dotted name inside the package: "svi", "estimators.exact", "models.vae"; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "pyro_vae" else parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def sources():
    """{dotted name: syntax tree} of every file of the library; the link pyro_vae/models is not followed twice."""
    paths = [path for path in (ROOT / "pyro_vae").rglob("*.py") if "models" not in path.relative_to(ROOT).parts]
    paths += (ROOT / "models").glob("*.py")
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(paths)}


def imported(name):
    """Everything that a file imports, as dotted names with what is imported `from` them; relative ones resolved."""
    package = ["pyro_vae", *name.split(".")]
    is_package = any(other.startswith(f"{name}.") for other in sources()) or not name
    for node in ast.walk(sources()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + is_package] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_imports(name):
    """The library's files among them, by dotted name."""
    found = set()
    for full in imported(name):
        parts = full.split(".")
        if parts[0] == "pyro_vae":
            inner = [".".join(parts[1:stop]) for stop in range(len(parts), 1, -1)]
            found.add(next((each for each in inner if each in sources()), ""))
    return found - {"", name}


def layer_of(name):
    top = name.split(".")[0]
    found = [place for place, names in enumerate(LAYERS) if top in names]
    assert found, f"{name} has no place in LAYERS (tests/test_imports.py): say what it may import"
    return found[0]


def uses(name, word):
    """Whether a name, an attribute or an import in a file is `word`."""
    tree = sources()[name]
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return word in words or any(word in full.split(".") for full in imported(name))


def modules_after(statement):
    """Names of the modules that an interpreter has loaded after a statement."""
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_parser_sees_what_is_there():
    assert {"traces", "spaces", "distributions"} <= own_imports("models.gmm") | {"spaces"}
    assert "estimators.importance" in own_imports("estimators.exact")
    assert "guides.family" in own_imports("models.vae")
    assert "checkpoint" in own_imports("svi")


@pytest.mark.parametrize("name", [each for each in sources() if each])
def test_imports_go_down_only(name):
    above = [other for other in own_imports(name) if layer_of(other) > layer_of(name)]
    assert not above, f"{name} imports {above}, which lie above it"


def test_no_import_goes_in_a_circle():
    TopologicalSorter({name: own_imports(name) for name in sources()}).prepare()  # raises CycleError


def test_only_traces_touches_poutine():
    assert {name.split(".")[0] for name in sources() if uses(name, "poutine")} == {"traces"}


def test_models_import_the_lower_layers_pyro_and_torch_only():
    for name in sources():
        if name.startswith("models."):
            assert {other.split(".")[0] for other in own_imports(name)} <= FOR_MODELS, name
            outside = {full.split(".")[0] for full in imported(name)} - {"pyro_vae", "pyro", "torch"}
            assert outside <= sys.stdlib_module_names, name


def test_no_library_file_imports_a_concrete_model():
    for name in sources():
        if not name.startswith("models"):
            assert not [full for full in imported(name) if full.startswith("pyro_vae.models.")], name


def test_only_the_command_line_prints():
    for name, tree in sources().items():
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"print", "click.echo", "echo", "sys.stdout.write", "sys.stderr.write"} or name in CLI, name
        parses = [full for full in imported(name) if full.split(".")[0] == "click"]
        assert name in (*CLI, "options") or not parses, name


@pytest.mark.parametrize("statement", ["import pyro_vae; dir(pyro_vae)", "import pyro_vae.cli"])
def test_importing_loads_nothing_heavy(statement):
    assert not modules_after(statement) & set(HEAVY)


def test_every_public_name_can_be_imported():
    import pyro_vae

    assert [name for name in pyro_vae.__all__ if getattr(pyro_vae, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyro_vae.nothing  # noqa: B018
