"""The table of vLLM's own tests: what it says, and that a mistake in it is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci.upstream.table import TABLE, parse

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]

TEXT = """
# comment
[first 60]
tests/a.py
tests/b.py
[each 30 apart]
tests/c.py
tests/d.py
[left out]
tests/a.py::test_x[cuda]: needs CUDA: really
tests/b.py::test_y*: too long
[files left out]
tests/slow/*: too long: hours
"""


def test_groups_and_what_is_left_out() -> None:
    table = parse(TEXT)
    first, each = table.groups
    assert (first.name, first.limit_s, first.runs()) == ("first", 60, [("tests/a.py", "tests/b.py")])
    assert (each.name, each.limit_s, each.runs()) == ("each", 30, [("tests/c.py",), ("tests/d.py",)])
    assert [entry.reason for entry in table.excluded] == ["needs CUDA: really", "too long"]


def test_a_star_stands_for_anything_and_brackets_for_themselves() -> None:
    exact, starred = parse(TEXT).excluded
    assert exact.matches("tests/a.py::test_x[cuda]") and not exact.matches("tests/a.py::test_xc")
    assert starred.matches("tests/b.py::test_y[1-2]") and not starred.matches("tests/b.py::test_z")


def test_left_out_by_file() -> None:
    assert [entry.pattern for entry in parse(TEXT).excluded_in({"tests/b.py"})] == ["tests/b.py::test_y*"]


def test_every_file_is_in_a_group_or_left_out() -> None:
    table = parse(TEXT)
    run = {"tests/a.py", "tests/b.py", "tests/c.py", "tests/d.py"}
    assert table.unknown({*run, "tests/slow/x.py"}) == []
    assert table.unknown({*run, "tests/slow/x.py", "tests/new.py"}) == ["tests/new.py: in no group, and not left out"]
    assert table.unknown(run - {"tests/d.py"}) == [
        "tests/d.py: no such file",
        "tests/slow/*: no file that does not run",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "tests/a.py",  # in no group
        "[first]",  # without a limit
        "[left out]\ntests/a.py::test_x",  # without a reason
        "[left out]\ntests/a.py: a whole file",
        "[files left out]\ntests/a.py::test_x: a test",
    ],
)
def test_a_line_that_is_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no group"):
        parse(text)


@pytest.mark.parametrize("path", [TABLE, *sorted((ROOT / "ci" / "conformance").glob("*.txt"))], ids=lambda p: p.name)
def test_our_tables_leave_out_only_of_files_that_run(path: Path) -> None:
    table = parse(path.read_text())
    tests = [test for group in table.groups for test in group.tests]
    assert table.excluded_in({test.partition("::")[0] for test in tests}) == list(table.excluded)
    assert len(tests) == len(set(tests)), "a test in two groups"
