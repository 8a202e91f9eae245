"""What a run will need in memory, process by process and phase by phase, before a weight is loaded.

A process holds some things all the time (weights, optimizer) and some in one phase (activations while it learns), so
its peak is the largest phase, not the sum of everything. Everything here is arithmetic on sizes; where they come from
see footprint.py (activations), workload.py (micro-batches) and forecast.py. docs/memory.md has what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["load", "generate", "learn", "sync"]
PHASES: tuple[Phase, ...] = ("load", "generate", "learn", "sync")
GB = 1e9
MODULES = "Python and modules"


@dataclass(frozen=True)
class Term:
    """Bytes of one thing, in the phases in which a process holds it."""

    name: str
    bytes: int
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True)
class Process:
    """One process of the run."""

    name: str
    terms: tuple[Term, ...]

    def at(self, phase: Phase) -> int:
        """Bytes that it holds in a phase."""
        return sum(term.bytes for term in self.terms if phase in term.phases)

    @property
    def phase(self) -> Phase:
        """The phase with the most."""
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> int:
        """Bytes in that phase."""
        return self.at(self.phase)


@dataclass(frozen=True)
class Footprint:
    """A run's processes, the most it puts into /dev/shm during a sync, and whether all this is memory of a GPU."""

    processes: tuple[Process, ...]
    shared: int = 0
    gpu: bool = False

    @property
    def peak(self) -> int:
        """Of all processes together: none gives back to the system what it had once."""
        return sum(process.peak for process in self.processes) + self.shared

    @property
    def lines(self) -> list[str]:
        """A line for each process: its peak, the phase, and what it holds then, the largest first."""
        found = []
        for process in self.processes:
            held = sorted((t for t in process.terms if process.phase in t.phases), key=lambda term: -term.bytes)
            parts = ", ".join(f"{term.name} {size(term.bytes)}" for term in held if term.bytes >= 0.005 * GB)
            phases = ", ".join(f"{phase} {size(process.at(phase))}" for phase in PHASES)
            found.append(f"{process.name}: at most {size(process.peak)} ({phases}). In {process.phase}: {parts}")
        if self.shared:
            found.append(f"/dev/shm: {size(self.shared)} during a sync")
        return found


@dataclass(frozen=True)
class Room:
    """What there is for a run: bytes of memory, and in /dev/shm; None where nobody says."""

    memory: int | None
    shared: int | None = None

    def lacks(self, footprint: Footprint, margin: float = 1.0) -> bool:
        """The footprint is more than `margin` times what there is."""
        pairs = ((footprint.peak, self.memory), (footprint.shared, self.shared))
        return any(there is not None and need > margin * there for need, there in pairs)


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / GB:.2f} GB" if count >= 0.1 * GB else f"{count / 1e6:.0f} MB"
