"""The suites of `make test` and of CI: the tests of each, and what it needs. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

NEEDS: Mapping[str, str] = {
    "compiler": "a C++ compiler, for the software NPU (apt-get install g++)",
    "root": "root, for nodes with addresses of their own (network namespaces)",
    "npu": "an Ascend NPU that `npu-smi info` shows as OK",
    "cuda": "a GPU that `nvidia-smi` shows",
}
"""What a suite can need of its machine, with the text of the message."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tests of ``paths`` that ``select`` chooses by marker."""

    name: str
    what: str
    paths: tuple[str, ...]
    select: str
    needs: frozenset[str] = frozenset()
    wrapped: bool = False
    """Whether pytest itself runs on software NPUs."""
    processes: int = 0
    """Processes of pytest-xdist, each of which runs whole files; 0: without pytest-xdist."""
    minutes: int = 60
    """Limit after which CI ends it; 0: none."""

    def lacks(self, has: Iterable[str]) -> list[str]:
        """Return what the suite needs and the machine lacks."""
        return [NEEDS[need] for need in sorted(self.needs - set(has))]

    def command(self, python: Sequence[str], softnpu: Sequence[str], options: Sequence[str]) -> list[str]:
        """Return the command line; ``python`` starts Python, and ``softnpu`` the command of the software NPU."""
        spread = ["-n", str(self.processes), "--dist", "loadfile"] if self.processes else []
        run = [*python, "-m", "pytest", *self.paths, "-m", self.select, *spread, *options]
        return [*softnpu, "exec", "--", *run] if self.wrapped else run


def _suites(*suites: Suite) -> dict[str, Suite]:
    return {suite.name: suite for suite in suites}


_ENGINES = frozenset({"compiler", "root"})

SUITES: Mapping[str, Suite] = _suites(
    Suite(
        "unit",
        "pure functions, contracts with upstream's sources",
        ("tests/unit", "tests/contract"),
        "not slow",
        processes=2,
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
        "the plugin, Ray clusters and vLLM's engine together, on software NPUs",
        ("tests/softnpu",),
        "integration and not slow",
        _ENGINES,
        wrapped=True,
        processes=3,
        minutes=40,
    ),
    Suite(
        "patches",
        "each patch in patches/ with the released and with the patched package",
        ("tests/patches",),
        "integration and not slow",
        frozenset({"compiler"}),
        minutes=20,
    ),
    Suite("e2e", "vllm serve and clients, on software NPUs", ("tests/e2e",), "e2e and not slow", _ENGINES, minutes=75),
    Suite(
        "multinode",
        "those of e2e and slow that need several nodes",
        ("tests/e2e",),
        "multinode",
        _ENGINES,
        minutes=180,
    ),
    Suite("slow", "further combinations of e2e", ("tests/e2e",), "slow", _ENGINES, minutes=240),
    Suite("slow-softnpu", "slow tests of integration", ("tests/softnpu",), "slow", _ENGINES, wrapped=True),
    Suite("slow-contract", "compiled modules of every torch_npu", ("tests/contract",), "slow"),
    Suite("slow-patches", "patches that need a Ray cluster", ("tests/patches",), "slow", _ENGINES),
    Suite("faults", "faults of every kind in every phase", ("tests/faults",), "faults", _ENGINES, minutes=240),
    Suite("npu", "the device layer on a real NPU", ("tests/hardware",), "npu", frozenset({"npu"}), minutes=30),
    Suite("cuda", "the device layer on a real GPU", ("tests/hardware",), "cuda", frozenset({"cuda"}), minutes=30),
)

EVERY_CHANGE = ("unit", "patches", "softnpu", "integration", "e2e", "npu", "cuda")
"""The suites of `all`: each runs where its machine has what it needs. The others run at night."""


def chosen(names: Sequence[str]) -> list[Suite]:
    """Return the suites with these names, in this order. Raises KeyError for an unknown one."""
    wanted = [each for name in names for each in (EVERY_CHANGE if name == "all" else (name,))]
    return [SUITES[name] for name in dict.fromkeys(wanted)]
