"""The promises of `make verify`, in small: fewer repeats, and digits in place of MNIST."""

from pathlib import Path

import pytest
from verify import tasks

TASKS = tasks(small=True, root=None, run=Path("runs"))


@pytest.mark.parametrize("name", TASKS)
def test_every_promise_holds(name):
    rows = list(TASKS[name]())
    assert rows
    assert [row for row in rows if row.holds is not None and not row.holds] == []
