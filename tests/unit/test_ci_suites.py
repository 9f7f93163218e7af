"""Suites of `make test` and CI: what runs, what is left out, and that no failure is hidden. With real pytest."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from ci import suite as command
from ci.junit import outcome
from ci.matrix import read
from ci.runner import Runner, detect
from ci.suites import EVERY_CHANGE, NEEDS, SUITES, Suite, chosen

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pathlib, pytest

def test_right():
    pass

@pytest.mark.parametrize("word", ["a b", "c"])
def test_flaky(word):
    seen = pathlib.Path(__file__).with_name(f"seen-{word}")
    if word == "c" and not seen.exists():
        seen.touch()
        raise ValueError("the first time only")

@pytest.mark.skipif(True, reason="needs a sunny day")
def test_skipped():
    pass
"""


def made(tmp_path: Path, tests: str) -> Suite:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_made.py").write_text(tests)
    return Suite("made", "tests made here", (str(tmp_path / "tests"),), "not slow")


@pytest.mark.parametrize("processes", [0, 2])
def test_a_flake_is_reported_with_its_first_failure(tmp_path: Path, processes: int) -> None:
    suite = dataclasses.replace(made(tmp_path, TESTS), processes=processes)
    found = command.run(suite, tmp_path, rerun=True, further=["-q"])
    assert (found.passed, found.failed, found.skipped) == (2, {}, {"needs a sunny day": 1})
    ((name, text),) = found.flaky.items()
    assert name.endswith("test_made::test_flaky[c]") and text == "ValueError: the first time only"
    root = ElementTree.parse(tmp_path / "made.xml").getroot()
    assert "the first time only" in (root.findtext(".//testcase/flakyFailure") or "")
    assert [each.get("failures") for each in root.iter("testsuite")] == ["0"]
    text = command.summary("x", {"made": found}, {})
    assert "| made | 2 | 0 | 1 | 1 |" in text and "the first time only" in text


def test_what_fails_twice_has_failed_and_shows_both(tmp_path: Path) -> None:
    tests = TESTS.replace(
        "        seen.touch()\n", "        pathlib.Path(f'{seen}.{len(list(seen.parent.iterdir()))}').touch()\n"
    )
    found = command.run(made(tmp_path, tests), tmp_path, rerun=True, further=["-q"])
    assert len(found.failed) == 1 and not found.flaky
    root = ElementTree.parse(tmp_path / "made.xml").getroot()
    assert [each.get("failures") for each in root.iter("testsuite")] == ["1"]
    assert len(root.findall(".//rerunFailure")) == 1


def test_many_failures_are_not_run_again(tmp_path: Path) -> None:
    tests = "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_wrong(n):\n    assert n < 0\n"
    found = command.run(made(tmp_path, tests), tmp_path, rerun=True, further=["-q"])
    assert len(found.failed) == 4 and not (tmp_path / "made-again.xml").exists()


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("", "no test was run"),
        ("import os\ndef test_gone():\n    os._exit(7)\n", "pytest ended with exit code 7"),
        ("def test_here():\n    pass\nraise SystemError('while collecting')\n", "collection failure"),
    ],
)
def test_a_run_without_tests_has_failed(tmp_path: Path, tests: str, reason: str) -> None:
    found = command.run(made(tmp_path, tests), tmp_path, rerun=True, further=["-q"])
    assert not found.passed
    assert any(reason in f"{name} {text}" for name, text in found.failed.items())


def test_make_test_runs_nothing_twice_and_leaves_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = dataclasses.replace(made(tmp_path, TESTS), needs=frozenset({"npu"}))
    monkeypatch.setattr(command, "SUITES", {"made": suite})
    monkeypatch.setattr(command, "chosen", lambda names: [suite])
    assert command.main(["--local", "made", "--results", str(tmp_path), "--pytest", "-q"]) == 1
    assert "| made | 2 | 1 | 0 | 1 |" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "made-again.xml").exists()


def test_flakes_are_noted(tmp_path: Path) -> None:
    found = command.run(made(tmp_path, TESTS), tmp_path, rerun=True, further=["-q"])
    command._note_flaky({"made": found}, tmp_path)
    (line,) = (tmp_path / "flaky.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["suite"], entry["failure"]) == ("made", "ValueError: the first time only")


def test_what_a_machine_lacks_is_listed() -> None:
    plain = Runner("none", root=True, compiler="g++")
    assert [suite.name for suite in chosen(["all"]) if suite.lacks(plain.has)] == ["npu", "cuda"]
    assert SUITES["npu"].lacks(plain.has) == [NEEDS["npu"]]
    assert chosen(["e2e", "all"])[0].name == "e2e" and len(chosen(["e2e", "all"])) == len(EVERY_CHANGE)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["nonsense"], 2, "no suite nonsense"), ([], 2, "no suite given"), (["--list"], 0, "vllm serve and clients")],
)
def test_the_command(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ci.suite", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code and said in done.stdout + done.stderr


def test_a_suite_that_cannot_run_is_reported_with_the_reason(tmp_path: Path) -> None:
    missing = next((name for name in ("npu", "cuda") if SUITES[name].lacks(detect().has)), None)
    if missing is None:
        pytest.skip("this machine has an NPU and a GPU")
    arguments = [sys.executable, "-m", "ci.suite", missing, "--results", str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert f"| {missing} | not run: needs {NEEDS[missing]}" in (tmp_path / "summary.md").read_text()


def test_markers_of_suites_are_registered_and_paths_are_there() -> None:
    registered = set(re.findall(r"^    (\w+):", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
    for suite in SUITES.values():
        assert set(re.findall(r"\w+", suite.select)) - {"and", "not", "or"} <= registered
        assert any((ROOT / path).is_dir() for path in suite.paths), suite
        assert suite.needs <= set(NEEDS)


def test_pipelines_name_suites_that_there_are() -> None:
    found: list[str] = []
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {}).get("suites", [])
            with_suites = [step["with"]["suites"] for step in job["steps"] if "suites" in step.get("with", {})]
            found += [each for each in (*matrix, *with_suites) if "${{" not in each]
    assert found
    assert {name for each in found for name in each.split()} <= {*SUITES, "all"}
    assert set(EVERY_CHANGE) <= {name for each in found for name in each.split()}


def test_make_runs_tests_by_suites_only() -> None:
    recipes = re.findall(r"^\t.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    calls = [names for recipe in recipes for names in re.findall(r"\$\(call suite,([\w -]+)\)", recipe)]
    called = {name for names in calls for name in names.split()}
    assert called <= set(SUITES) and {*EVERY_CHANGE} - {"npu", "cuda"} <= called
    assert not [recipe for recipe in recipes if "-m pytest" in recipe]


def test_containers_and_manifests_have_the_versions_that_were_run() -> None:
    matrix = read()
    run = {name: [each.version for each in matrix.projects[name] if "e2e" in each.run] for name in matrix.projects}
    found: dict[str, set[str]] = {}
    for path in (ROOT / "ci" / "containers").glob("*.Dockerfile"):
        for name, version in re.findall(r"^ARG (VLLM|VLLM_ASCEND|RAY)=(\S+)$", path.read_text(), re.MULTILINE):
            found.setdefault(name.lower().replace("_", "-"), set()).add(version)
    for path in (ROOT / "docs" / "kuberay").glob("*.yaml"):
        found["ray"] |= set(re.findall(r'rayVersion: "(\S+)"', path.read_text()))
        found["vllm-ascend"] |= set(re.findall(r"image: \S+:(\S+)", path.read_text()))
    assert set(found) == {"vllm", "vllm-ascend", "ray"}
    assert all(versions <= set(run[name]) for name, versions in found.items()), (found, run)


def test_a_report_of_pytests_own_is_read() -> None:
    text = (
        '<testsuites><testsuite name="pytest" errors="1" failures="0" time="2.5"><testcase classname="a" name="b">'
        '<error message="fixture failed">long</error></testcase><testcase classname="a" name="c"/>'
        "</testsuite></testsuites>"
    )
    found = outcome(text)
    assert (found.passed, found.failed, found.seconds, found.ran) == (1, {"a::b": "fixture failed"}, 2.5, 2)


@pytest.mark.parametrize(("setting", "reruns"), [("RERUN=", False), ("RERUN=0", False), ("RERUN=1", True)])
def test_make_runs_failures_again_only_where_asked(setting: str, reruns: bool) -> None:
    made = subprocess.run(["make", "-n", "test", setting], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "ci.suite --local" in made and ("--rerun" in made) == reruns
