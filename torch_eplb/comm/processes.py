"""Which process a rank is, and whether a process of this machine still lives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessIdentity"]


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from every other one of all machines.

    Attributes:
        machine: a machine's boot and its namespace of process ids; "" where it cannot be told.
        pid: the process id there.
        started: when it started, in clock ticks since the boot: process ids are used again.
    """

    machine: str
    pid: int
    started: int

    @classmethod
    def own(cls) -> ProcessIdentity:
        """This process."""
        pid = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
            return cls(machine, pid, _started(pid))
        except OSError:
            return cls("", pid, 0)

    def is_beside(self, other: ProcessIdentity) -> bool:
        """Whether the two can see each other's state."""
        return bool(self.machine) and self.machine == other.machine

    def is_gone(self) -> bool:
        """Whether it has ended; to be asked on its own machine only."""
        try:
            return _started(self.pid) != self.started
        except OSError:
            return True


def _started(pid: int) -> int:
    """Start time of a live process; OSError where there is none, or only its remains."""
    # The name, in parentheses, may hold anything; after it come state, parent, ... (man 5 proc).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return int(fields[19])
