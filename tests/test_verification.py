"""The promises of `make verify`, in small: fewer repeats, and digits in place of MNIST."""

import pytest
from verification import annealing, coverage, pairs, reproducibility, two_modes

PROMISES = {
    "coverage": coverage.rows,
    "two modes": two_modes.rows,
    "annealing": annealing.rows,
    "pairs": pairs.rows,
    "reproducibility": reproducibility.rows,
}


@pytest.mark.parametrize("name", PROMISES)
def test_every_promise_holds(name):
    rows = list(PROMISES[name](small=True))
    assert rows
    assert [row for row in rows if not row.holds] == []
