"""The suites of CI: what each runs, on what, and what it needs. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

NEEDS: Mapping[str, str] = {
    "compiler": "a C++ compiler, for the software NPU (apt-get install g++)",
    "root": "root, for nodes with addresses of their own (network namespaces)",
    "npu": "an Ascend NPU that `npu-smi info` shows as OK",
    "cuda": "a GPU that `nvidia-smi` shows",
}
"""What a suite can need of its machine, in words."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tests of ``paths`` that ``select`` chooses by marker. ``reruns``: whether failures are run a second time."""

    name: str
    what: str
    paths: tuple[str, ...]
    select: str
    needs: frozenset[str] = frozenset()
    wrapped: bool = False
    """Whether pytest itself runs on software NPUs."""
    reruns: bool = True
    processes: int = 0
    """Beside each other, a file of tests in one of them (pytest-xdist); 0: in pytest's own."""
    minutes: int = 60
    """After which it is ended."""

    def lacks(self, has: Iterable[str]) -> list[str]:
        """What it needs and the machine lacks, in words."""
        return [NEEDS[need] for need in sorted(self.needs - set(has))]

    def command(self, python: Sequence[str], softnpu: Sequence[str], options: Sequence[str]) -> list[str]:
        """Its command line; ``python`` and ``softnpu`` start Python and the command of the software NPU."""
        spread = ["-n", str(self.processes), "--dist", "loadfile"] if self.processes else []
        run = [*python, "-m", "pytest", *self.paths, "-m", self.select, *spread, *options]
        return [*softnpu, "softnpu", "exec", "--", *run] if self.wrapped else run


def _suites(*suites: Suite) -> dict[str, Suite]:
    return {suite.name: suite for suite in suites}


_ENGINES = frozenset({"compiler", "root"})

SUITES: Mapping[str, Suite] = _suites(
    Suite(
        "unit",
        "pure functions, contracts with upstream's sources",
        ("tests/unit", "tests/contract"),
        "not slow",
        reruns=False,
        minutes=20,
    ),
    Suite(
        "softnpu",
        "torch_npu, HCCL, graphs on software NPUs",
        ("tests/softnpu",),
        "softnpu and not integration and not slow",
        frozenset({"compiler"}),
        wrapped=True,
        processes=3,
        minutes=40,
    ),
    Suite(
        "integration",
        "the plugin, Ray clusters and vLLM's engine together, on software NPUs; the patches of patches/",
        ("tests/softnpu", "tests/patches"),
        "integration and not slow",
        _ENGINES,
        wrapped=True,
        minutes=40,
    ),
    Suite("e2e", "vllm serve and clients, on software NPUs", ("tests/e2e",), "e2e and not slow", _ENGINES, minutes=75),
    Suite(
        "multinode",
        "those of them that take several nodes, the slow ones too",
        ("tests/e2e",),
        "multinode",
        _ENGINES,
        minutes=180,
    ),
    Suite("slow", "further combinations", ("tests/e2e",), "slow", _ENGINES, minutes=240),
    Suite("faults", "faults of every kind in every phase", ("tests/faults",), "faults", _ENGINES, minutes=240),
    Suite("npu", "the device layer on a real NPU", ("tests/hardware",), "npu", frozenset({"npu"}), minutes=30),
    Suite("cuda", "the device layer on a real GPU", ("tests/hardware",), "cuda", frozenset({"cuda"}), minutes=30),
)

EVERY_CHANGE = ("unit", "softnpu", "integration", "e2e", "npu", "cuda")
"""What `all` stands for: each runs where its machine has what it needs. The others are for the night."""


def chosen(names: Sequence[str]) -> list[Suite]:
    """The suites with these names, in their order. Raises KeyError for one that is none."""
    wanted = [each for name in names for each in (EVERY_CHANGE if name == "all" else (name,))]
    return [SUITES[name] for name in dict.fromkeys(wanted)]
