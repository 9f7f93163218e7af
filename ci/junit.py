"""JUnit files: what failed, what was left out, and the first failure of a test that passed when it ran again. Pure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from xml.etree import ElementTree

_FAILED = ("failure", "error")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a suite came to. Names are "module::test"; texts are first lines."""

    passed: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    flaky: dict[str, str] = dataclasses.field(default_factory=dict)
    """Failed first, passed when they ran again: with the first failure."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reasons, and how many tests give each."""
    seconds: float = 0.0

    @property
    def ran(self) -> int:
        """Tests that were run, whatever came of it."""
        return self.passed + len(self.failed) + len(self.flaky)


def merged(first: str, again: str) -> str:
    """Return the report of a run, with the results of its failures when they ran again.

    As Surefire writes it: a test that passed then has its first failure as <flakyFailure>, one that failed again keeps
    <failure> and has the second as <rerunFailure>. Nothing of the first run is taken away.
    """
    root = ElementTree.fromstring(first)
    second = {_name(case): case for case in ElementTree.fromstring(again).iter("testcase")}
    for suite in root.iter("testsuite"):
        for case in suite.iter("testcase"):
            if _name(case) not in second:
                continue
            now = _failures(second[_name(case)])
            for failure in _failures(case):
                if now:
                    case.append(_renamed(now[0], "rerunFailure"))
                else:
                    _count(suite, failure.tag)
                    failure.tag = "flakyFailure"
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def outcome(text: str) -> Outcome:
    """Return the outcome of a report, also of one made by `merged`."""
    failed: dict[str, str] = {}
    flaky: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    passed = 0
    root = ElementTree.fromstring(text)
    for case in root.iter("testcase"):
        found = {child.tag: child for child in reversed(list(case))}
        failures = _failures(case)
        if failures:
            failed[_name(case)] = _first_line(failures[0])
        elif "flakyFailure" in found:
            flaky[_name(case)] = _first_line(found["flakyFailure"])
        elif "skipped" in found:
            skipped[_first_line(found["skipped"])] += 1
        else:
            passed += 1
    seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    return Outcome(passed, failed, flaky, dict(skipped), seconds)


def _failures(case: ElementTree.Element) -> list[ElementTree.Element]:
    return [child for child in case if child.tag in _FAILED]


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _first_line(element: ElementTree.Element) -> str:
    text = element.get("message") or element.text or ""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:300]


def _renamed(element: ElementTree.Element, tag: str) -> ElementTree.Element:
    copy = ElementTree.Element(tag, element.attrib)
    copy.text = element.text
    return copy


def _count(suite: ElementTree.Element, tag: str) -> None:
    """Return one failure less in the suite's own sum, which readers compare with its test cases."""
    attribute = "errors" if tag == "error" else "failures"
    suite.set(attribute, str(max(0, int(suite.get(attribute, "0")) - 1)))
