"""tests.txt: which of vLLM's tests run, in which process, and which do not and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tests.txt")


@dataclass(frozen=True)
class Group:
    """Files, or single tests of them, that run in one process, which is ended after ``limit_s`` seconds."""

    name: str
    limit_s: int
    tests: tuple[str, ...]


@dataclass(frozen=True)
class ExcludedTest:
    """Tests that do not run here: a node id, in which ``*`` stands for anything, and the reason."""

    pattern: str
    reason: str

    def matches(self, node_id: str) -> bool:
        """Return whether the pattern matches the test with this id."""
        return re.fullmatch(".*".join(map(re.escape, self.pattern.split("*"))), node_id) is not None


@dataclass(frozen=True)
class Table:
    """The whole of tests.txt."""

    groups: tuple[Group, ...]
    excluded: tuple[ExcludedTest, ...]

    def excluded_in(self, files: set[str]) -> list[ExcludedTest]:
        """Return the tests of ``files`` that do not run."""
        return [entry for entry in self.excluded if entry.pattern.partition("::")[0] in files]


def parse(text: str) -> Table:
    """Read a table: ``[name seconds]`` starts a group of files, ``[left out]`` lines of ``test: reason``.

    Raises ValueError, with the line, for one that is neither.
    """
    groups: list[Group] = []
    excluded: list[ExcludedTest] = []
    in_excluded = False
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        if line == "[left out]":
            in_excluded = True
        elif heading := re.fullmatch(r"\[(\w+) (\d+)\]", line):
            in_excluded = False
            groups.append(Group(heading[1], int(heading[2]), ()))
        elif in_excluded and (entry := re.fullmatch(r"(\S+::.*?): (.+)", line)):
            excluded.append(ExcludedTest(entry[1], entry[2]))
        elif not in_excluded and groups and re.fullmatch(r"tests/\S+\.py(::\S+)?", line):
            last = groups[-1]
            groups[-1] = Group(last.name, last.limit_s, (*last.tests, line))
        else:
            raise ValueError(f"{TABLE.name}, line {number}: {line!r} is no group, no file and no `test: reason`")
    return Table(tuple(groups), tuple(excluded))
