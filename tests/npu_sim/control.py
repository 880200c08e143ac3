"""How tests steer the simulated device in their own process, and what they see of it."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch_eplb
from npu_sim.runtime import library

__all__ = [
    "Communicator",
    "break_communicator",
    "communicators",
    "delay",
    "host_waits",
    "repeated_messages",
    "report_lost_peers",
]

_KINDS = ("kernels", "host copies", "device copies", "transfers")
_PACKAGE = Path(torch_eplb.__file__).parent


def delay(kind: str, milliseconds: tuple[float, float], one_in: int = 1, seed: int = 0) -> None:
    """Hold up one of ``one_in`` tasks of a kind, on its stream, for a time drawn from a range.

    Args:
        kind: "kernels", "host copies" (between host and device), "device copies" or "transfers".
        milliseconds: the least and the most.
        one_in: 1 holds up all.
        seed: of what is drawn.
    """
    least, most = (int(1000 * value) for value in milliseconds)
    library().npu_sim_set_delay(_KINDS.index(kind), least, most, one_in, seed)


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """What makes this thread wait for the device inside, in order.

    Each is ``"<reason> in <file>:<function>"``: the reason is "stream", "event", "device" or
    "copy", the place is the innermost function of torch_eplb on the stack, or "elsewhere".
    """
    found: list[str] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def note(reason: bytes) -> None:
        found.append(f"{reason.decode()} in {_place()}")

    library().npu_sim_on_wait(note)
    try:
        yield found
    finally:
        library().npu_sim_on_wait(None)


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.name}"
    return "elsewhere"


@dataclass(frozen=True)
class Communicator:
    """One of HCCL's communicators.

    Attributes:
        ranks, rank: how many it has and which this process is.
        buffer: MiB of each of its two buffers.
        name: as torch_npu chose it.
    """

    ranks: int
    rank: int
    buffer: int
    name: str


def communicators() -> list[Communicator]:
    """Those that exist, in the order in which they were made."""
    text = ctypes.create_string_buffer(1 << 16)
    library().npu_sim_describe_communicators(text, ctypes.c_uint64(len(text)))
    rows = [line.split(" ", 3) for line in text.value.decode().splitlines()]
    return [Communicator(*map(int, row[:3]), row[3]) for row in rows]


def break_communicator(number: int, code: int = 21) -> None:
    """Let one of `communicators` report an error; what it is given from now on never ends.

    Args:
        number: its place in the list.
        code: HCCL's; 21 is HCCL_E_REMOTE.
    """
    if not library().npu_sim_break_communicator(ctypes.c_uint64(number), code):
        raise IndexError(f"there is no communicator {number}")


def report_lost_peers(report: bool) -> None:
    """Whether a communicator that has lost a peer reports that (at first it only waits)."""
    library().npu_sim_report_lost_peers(int(report))


def repeated_messages() -> int:
    """Messages in one HcclBatchSendRecv beyond the first to, or from, one peer."""
    counts = (ctypes.c_uint64 * 2)()
    places: Any = (ctypes.byref(counts, 8 * number) for number in range(2))
    library().npu_sim_count_batches(*places)
    return counts[1]
