"""The promises of `make verify`, in small: fewer repeats, and digits in place of MNIST."""

from pathlib import Path

import pytest
from verify import Row, number, section, tasks, written

TASKS = tasks(small=True, root=None, run=Path("runs"))


@pytest.mark.parametrize("name", TASKS)
def test_every_promise_holds(name):
    rows = list(TASKS[name]())
    assert rows
    assert [row for row in rows if row.holds is not None and not row.holds] == []


def test_an_item_that_is_measured_anew_leaves_the_others_as_they_were(tmp_path):
    table = tmp_path / "verification.md"
    found = {
        name: [([Row(name, "a case", seen, "1", seen == "1")], 0.5)] for name, seen in (("1 a", "1"), ("2 b", "2"))
    }
    written(table, {name: section(part) for name, part in found.items()}, found)
    first, second = table.read_text(encoding="utf-8").split("## 2 b")
    written(table, {"2 b": section([([Row("2 b", "a case", "1", "1", True)], 0.5)])}, found)
    again = table.read_text(encoding="utf-8")
    assert again.startswith(first)
    assert "| **fails** | a case | 2 | 1 |" in second
    assert "| holds | a case | 1 | 1 |" in again.split("## 2 b")[1]
    written(table, {}, ["2 b"])  # item 1 is no more
    assert "## 1 a" not in table.read_text(encoding="utf-8")
    assert {number(name) for name in found} == {1, 2}
