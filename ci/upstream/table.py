"""Tables of upstream's tests: which run, in which process, and which do not and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tests.txt")


@dataclass(frozen=True)
class Group:
    """Files, or single tests of them, that run in one process, which is ended after ``limit_s`` seconds.

    With ``apart`` each of them runs in a process of its own, with that limit.
    """

    name: str
    limit_s: int
    tests: tuple[str, ...]
    apart: bool = False

    def runs(self) -> list[tuple[str, ...]]:
        """Return the tests of each process."""
        return [(test,) for test in self.tests] if self.apart else [self.tests]


@dataclass(frozen=True)
class Excluded:
    """Tests, or files, that do not run here: a node id or path, in which ``*`` stands for anything, and the reason."""

    pattern: str
    reason: str

    def matches(self, node_id: str) -> bool:
        """Return whether the pattern matches the test or file with this id."""
        return re.fullmatch(".*".join(map(re.escape, self.pattern.split("*"))), node_id) is not None


@dataclass(frozen=True)
class Table:
    """The whole of a table."""

    groups: tuple[Group, ...]
    excluded: tuple[Excluded, ...]
    excluded_files: tuple[Excluded, ...] = ()

    def excluded_in(self, files: set[str]) -> list[Excluded]:
        """Return the tests of ``files`` that do not run."""
        return [entry for entry in self.excluded if entry.pattern.partition("::")[0] in files]

    def unknown(self, files: set[str]) -> list[str]:
        """Return what the table has and ``files``, all files of tests of a release, do not; then the reverse."""
        run = {test.partition("::")[0] for group in self.groups for test in group.tests}
        obsolete = [f"{path}: no such file" for path in sorted(run - files)]
        obsolete += [
            f"{entry.pattern}: no file that does not run"
            for entry in self.excluded_files
            if not any(entry.matches(path) for path in files - run)
        ]
        left = {path for path in files - run if not any(entry.matches(path) for entry in self.excluded_files)}
        return obsolete + [f"{path}: in no group, and not left out" for path in sorted(left)]


def parse(text: str) -> Table:
    """Read a table: ``[name seconds]`` starts a group of files, ``[name seconds apart]`` one of a process each,
    ``[left out]`` lines of ``test: reason``, ``[files left out]`` lines of ``file: reason``.

    Raises ValueError, with the line, for one that is none of them.
    """
    groups: list[Group] = []
    excluded: dict[str, list[Excluded]] = {"left out": [], "files left out": []}
    section = ""
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and (section := line.strip("[]")) in excluded:
            continue
        if heading := re.fullmatch(r"\[(\w+) (\d+)( apart)?\]", line):
            groups.append(Group(heading[1], int(heading[2]), (), bool(heading[3])))
        elif entry := re.fullmatch(_ENTRY[section], line) if section in excluded else None:
            excluded[section].append(Excluded(entry[1], entry[2]))
        elif section not in excluded and groups and re.fullmatch(r"\S+\.py(::\S+)?", line):
            last = groups[-1]
            groups[-1] = Group(last.name, last.limit_s, (*last.tests, line), last.apart)
        else:
            raise ValueError(f"line {number}: {line!r} is no group, no file and no `test: reason`")
    return Table(tuple(groups), tuple(excluded["left out"]), tuple(excluded["files left out"]))


_ENTRY = {"left out": r"(\S+::.*?): (.+)", "files left out": r"([^\s:]+): (.+)"}
