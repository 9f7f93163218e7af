"""`make conformance`: torch_npu's and vllm-ascend's own tests on software NPUs, with our plugin active.

Arguments: ``--torch-npu`` with a checkout of Ascend/pytorch, ``--vllm-ascend`` with a folder of vllm-ascend (otherwise
its source distribution is downloaded), groups of the two tables, and after ``--`` pytest's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ci.upstream.processes import Counts, Harness, import_tests_from, make_variables, print_counts
from ci.upstream.sources import FOLDERS, VLLM_ASCEND, installed_version, source_tree
from ci.upstream.table import parse
from demo.signals import exit_on_sigterm
from demo.train.recitation import DENSE, MOE

HERE = Path(__file__).parent
MODELS = {"deepseek-ai/DeepSeek-V2-Lite-Chat": MOE, "Qwen/Qwen3-0.6B": DENSE}
"""What vllm-ascend's tests name: here they are the demonstration's, found in Hugging Face's cache."""


@dataclass(frozen=True)
class Suite:
    """The tests of one project: folders of its tree, which are copied into one. They run in the first of them, or in
    the folder above where they import each other from there (``package``)."""

    name: str
    folders: tuple[str, ...]
    package: bool
    plugins: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Return the file of the table."""
        return HERE / f"{self.name}.txt"

    def copy(self, tree: Path, to: Path) -> Path:
        """Copy the folders from a tree, and return the one that the tests run in."""
        for folder in self.folders:
            shutil.copytree(tree / folder, to / folder)
        return to if self.package else to / self.folders[0]


TORCH_NPU = Suite("torch_npu", ("test",), package=False)
ASCEND = Suite("vllm_ascend", FOLDERS, package=True, plugins=("ci.conformance.vllm_ascend",))
MEMORY = {"pipeline": "1G", "weights": "8G"}
"""Memory of a software NPU by group, otherwise 4G: KV caches take a part of it, and tests wait until it is free."""


def main(arguments: Sequence[str]) -> int:
    """Run the groups; 0 where every test that is not left out passes, and every file is in a table."""
    exit_on_sigterm()
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, pytest_options = _parser().parse_args(arguments[:split]), tuple(arguments[split + 1 :])
    failed: list[str] = []
    for suite, tree in _trees(options):  # a short path, since Ray's sockets are in it
        with tempfile.TemporaryDirectory(prefix="conform-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            failed += _run(suite, tree, Path(folder), options.groups, pytest_options)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _trees(options: argparse.Namespace) -> list[tuple[Suite, Path]]:
    """Return the suites to run, each with the tree that has its tests."""
    found = []
    if options.torch_npu:
        found.append((TORCH_NPU, options.torch_npu))
    else:
        print("no checkout of Ascend/pytorch is given (TORCH_NPU_TESTS=FOLDER): torch_npu's tests do not run")
    return [*found, (ASCEND, options.vllm_ascend or source_tree(VLLM_ASCEND, installed_version(VLLM_ASCEND.name)))]


def _run(suite: Suite, tree: Path, folder: Path, names: list[str], options: tuple[str, ...]) -> list[str]:
    """Run the groups of a suite in a copy of its tests; returns the names of those that failed."""
    table = parse(suite.path.read_text())
    groups = [group for group in table.groups if not names or group.name in names]
    if not groups:
        return []
    sources = suite.copy(tree, folder / "tree")
    where = sources / suite.folders[0] if suite.package else sources
    files = {path.relative_to(sources).as_posix() for path in where.rglob("test_*.py")}
    variables = {**make_variables(folder, MODELS), "RAY_ADDRESS": "local"}  # tests are to find no Ray of others
    if suite.package:
        variables = import_tests_from(sources, variables)
    failed, counts = table.unknown(files), Counts()
    for group in groups:
        memory = {"SOFTNPU_MEMORY": MEMORY.get(group.name, "4G")}
        passed, found = Harness(suite.path, suite.plugins, sources, {**variables, **memory}, options).run(group)
        counts |= found
        failed += [] if passed else [group.name]
    print_counts(f"{suite.name} {installed_version(suite.name)}: {len(counts)} files of {len(files)} ran", counts)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make conformance")
    parser.add_argument("--torch-npu", type=Path, help="a checkout of Ascend/pytorch, of the installed release")
    parser.add_argument("--vllm-ascend", type=Path, help="a folder of vllm-ascend; otherwise it is downloaded")
    parser.add_argument("groups", nargs="*", help="groups of the tables; otherwise all")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
