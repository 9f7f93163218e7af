"""Which fault is put where: seeded combinations, and what has to be said of each."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What is done to an engine of two ranks, each on a node of its own."""

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
    """When. The text in the log that begins it, for those of the start."""

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
BREAKS_THE_CLUSTER = frozenset({Fault.RAYLET, Fault.LINK})
_DIES = r"(Worker process \d+ of rank \d .*died|rank \d \(.*\) failed: )"
_LATE = r"are not ready after"
_HANGS = r"has not ended after"
_SILENT = r"have no work, and have not answered"


@dataclass(frozen=True)
class Case:
    """One run: ``rank`` is the worker's that is hit."""

    fault: Fault
    phase: Phase
    rank: int
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"{self.fault.name}-{self.phase.name}-rank{self.rank}-tp{self.tp}pp{self.pp}".lower()

    @property
    def serves_on(self) -> bool:
        """Whether the engine is meant to serve nevertheless."""
        return self.fault is Fault.NO_CAPTURE


def every_kind() -> list[Case]:
    """Each fault in each phase once, of rank 1, by turns with tensor and with pipeline parallelism."""
    kinds = [(fault, phase) for fault in Fault for phase in Phase if phase in WHERE[fault]]
    return [Case(fault, phase, 1, *LAYOUTS[index % 2]) for index, (fault, phase) in enumerate(kinds)]


def combinations(seed: int, count: int) -> list[Case]:
    """``count`` random cases; the same for the same ``seed``."""
    choose = random.Random(seed)
    cases = []
    for _ in range(count):
        fault = choose.choice(list(Fault))
        phase = choose.choice([phase for phase in Phase if phase in WHERE[fault]])
        rank = 1 if fault in BREAKS_THE_CLUSTER else choose.randrange(2)
        cases.append(Case(fault, phase, rank, *choose.choice(LAYOUTS)))
    return cases


def expected(case: Case) -> str | None:
    """A pattern that the log has to have; None where the engine core is in no state to say anything, or ends anyway."""
    if case.fault in (Fault.DRIVER, Fault.SERVER) or case.phase is Phase.END or case.serves_on:
        return None
    if case.fault is Fault.STOP:
        if case.phase is Phase.IDLE:
            return _SILENT
        return _LATE if case.phase in (Phase.START, Phase.CAPTURE) else _HANGS
    if case.fault is Fault.SILENT:
        return rf"{_HANGS}|{_DIES}"
    return _DIES
