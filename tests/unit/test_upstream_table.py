"""The table of vLLM's own tests: what it says, and that a mistake in it is found."""

from __future__ import annotations

import pytest

from ci.upstream.table import TABLE, parse

pytestmark = pytest.mark.unit

TEXT = """
# comment
[first 60]
tests/a.py
tests/b.py
[left out]
tests/a.py::test_x[cuda]: needs CUDA: really
tests/b.py::test_y*: too long
"""


def test_groups_and_what_is_left_out() -> None:
    table = parse(TEXT)
    (group,) = table.groups
    assert (group.name, group.limit_s, group.tests) == ("first", 60, ("tests/a.py", "tests/b.py"))
    assert [entry.reason for entry in table.excluded] == ["needs CUDA: really", "too long"]


def test_a_star_stands_for_anything_and_brackets_for_themselves() -> None:
    exact, starred = parse(TEXT).excluded
    assert exact.matches("tests/a.py::test_x[cuda]") and not exact.matches("tests/a.py::test_xc")
    assert starred.matches("tests/b.py::test_y[1-2]") and not starred.matches("tests/b.py::test_z")


def test_left_out_by_file() -> None:
    assert [entry.pattern for entry in parse(TEXT).excluded_in({"tests/b.py"})] == ["tests/b.py::test_y*"]


@pytest.mark.parametrize(
    "text",
    [
        "tests/a.py",  # in no group
        "[first]",  # without a limit
        "[left out]\ntests/a.py::test_x",  # without a reason
        "[left out]\ntests/a.py: a whole file",
    ],
)
def test_a_line_that_is_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no group"):
        parse(text)


def test_our_table_leaves_out_only_of_files_that_run() -> None:
    table = parse(TABLE.read_text())
    tests = [test for group in table.groups for test in group.tests]
    assert table.excluded_in({test.partition("::")[0] for test in tests}) == list(table.excluded)
    assert len(tests) == len(set(tests)), "a test in two groups"
