"""The README's examples run, and it holds no gaps."""

import re
from pathlib import Path

import pytest

import pyro_vae as pv

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_python_example(capsys):
    code = BLOCKS[0].replace("num_epochs=100", "num_epochs=2").replace("multilevel(500,", "multilevel(50,")
    assert code != BLOCKS[0]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "unbiased" in printed
    assert "Paired differences of mean log p(x) in nats, 360 data" in printed


def test_the_example_of_estimators(capsys):
    code = BLOCKS[1].replace("num_epochs=30", "num_epochs=1").replace("num_steps=20", "num_steps=2")
    code = code.replace("subset(40,", "subset(4,").replace("num_simulated=20", "num_simulated=4")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Interval(low=" in printed
    assert "ELBO" in printed


def test_the_example_of_an_energy(capsys):
    exec(compile(BLOCKS[2], "README.md", "exec"), {})
    first, _, last = capsys.readouterr().out.splitlines()
    assert first.startswith("upper ")
    assert last == "exact"


def test_the_model_of_your_own():
    names: dict = {}
    exec(compile(BLOCKS[-1], "README.md", "exec"), names)
    data = pv.load_data("digits", space="real")
    model = names["FactorAnalysis"](data.space)
    history = pv.fit(model, data, num_epochs=5, learning_rate=1e-2)
    rows = [row["valid_elbo"] for row in history.rows]
    assert rows[-1] > rows[0]
    result = pv.log_likelihood(model, data.test.subset(20), estimator=pv.importance_sampling(50))
    assert result.direction == "lower"


@pytest.mark.parametrize(
    "path", re.findall(r"\]\((?!http)([^)#]+)\)|`((?:notebooks|models|benchmarks)/[\w/.]+)`", TEXT)
)
def test_what_it_points_to_is_there(path):
    assert (ROOT / (path[0] or path[1])).exists()


def test_it_has_no_gaps():
    assert "@@" not in TEXT
