"""Which fault is injected where: seeded combinations, and the log line that each must cause."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What is injected into an engine of two ranks, each on a node of its own."""

    KILL = "a worker gets SIGKILL"
    ABORT = "a worker gets SIGABRT"
    STOP = "a worker gets SIGSTOP"
    SILENT = "an HCCL peer takes part in no further operation"
    NO_MEMORY = "an NPU has no memory left"
    NO_DEVICE = "an NPU does not open"
    NO_CAPTURE = "a graph capture fails"
    DRIVER = "the engine core gets SIGKILL"
    RAYLET = "a node's raylet gets SIGKILL"
    LINK = "a node's link is cut"
    SERVER = "the server, which started the engine core, gets SIGKILL"


class Phase(Enum):
    """When a fault is injected. For phases of the startup: the log text that begins them."""

    START = "start: worker processes took"
    CAPTURE = "start: KV cache took"
    IDLE = "idle"
    PREFILL = "prefill"
    DECODE = "decode"
    END = "end"


ANY = frozenset(Phase)
SERVING = frozenset({Phase.IDLE, Phase.PREFILL, Phase.DECODE})
WHERE: dict[Fault, frozenset[Phase]] = {
    Fault.KILL: ANY,
    Fault.ABORT: ANY,
    Fault.STOP: ANY,
    Fault.SILENT: SERVING,
    Fault.NO_MEMORY: frozenset({Phase.START, Phase.PREFILL}),
    Fault.NO_DEVICE: frozenset({Phase.START}),
    Fault.NO_CAPTURE: frozenset({Phase.CAPTURE}),
    Fault.DRIVER: ANY,
    Fault.RAYLET: ANY - {Phase.END},
    Fault.LINK: SERVING,
    Fault.SERVER: frozenset({Phase.CAPTURE, Phase.IDLE, Phase.DECODE}),
}
LAYOUTS = ((2, 1), (1, 2))
"""Tensor and pipeline parallel sizes."""
BREAKS_CLUSTER = frozenset({Fault.RAYLET, Fault.LINK})
_DIES = r"(Worker process \d+ of rank \d .*died|rank \d \(.*\) failed: )"
_LATE = r"are not ready after"
_HANGS = r"has not ended after"
_SILENT = r"have no work, and have not answered"


@dataclass(frozen=True)
class Case:
    """One run: ``rank`` is that of the affected worker."""

    fault: Fault
    phase: Phase
    rank: int
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"{self.fault.name}-{self.phase.name}-rank{self.rank}-tp{self.tp}pp{self.pp}".lower()

    @property
    def continues_serving(self) -> bool:
        """Whether the engine has to serve nevertheless."""
        return self.fault is Fault.NO_CAPTURE


def one_case_per_kind() -> list[Case]:
    """Return each fault in each phase once, of rank 1, by turns with tensor and with pipeline parallelism."""
    kinds = [(fault, phase) for fault in Fault for phase in Phase if phase in WHERE[fault]]
    return [Case(fault, phase, 1, *LAYOUTS[index % 2]) for index, (fault, phase) in enumerate(kinds)]


def combinations(seed: int, count: int) -> list[Case]:
    """Return ``count`` random cases; the same for the same ``seed``."""
    choose = random.Random(seed)
    cases = []
    for _ in range(count):
        fault = choose.choice(list(Fault))
        phase = choose.choice([phase for phase in Phase if phase in WHERE[fault]])
        rank = 1 if fault in BREAKS_CLUSTER else choose.randrange(2)
        cases.append(Case(fault, phase, rank, *choose.choice(LAYOUTS)))
    return cases


def expected(case: Case) -> str | None:
    """Return a pattern that the log must contain; None where the engine core cannot log anything, or exits anyway."""
    if case.fault in (Fault.DRIVER, Fault.SERVER) or case.phase is Phase.END or case.continues_serving:
        return None
    if case.fault is Fault.STOP:
        if case.phase is Phase.IDLE:
            return _SILENT
        return _LATE if case.phase in (Phase.START, Phase.CAPTURE) else _HANGS
    if case.fault is Fault.SILENT:
        return rf"{_HANGS}|{_DIES}"
    return _DIES
