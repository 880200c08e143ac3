"""Several wrapped models on one process group: ranks say which one they are in.

A draft and a target model, say. Where all ranks run them in the same order, nothing has to be said.
But if one rank is in the first while another is in the second, what they exchange would meet: of
equal size it would be taken for the other's, of unequal size the backend ends the process. So
from the second model of a group on, every layer begins with a message of a fixed size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from torch_eplb.comm.agreement import gather_json
from torch_eplb.comm.communicator import Communicator, all_gather_single
from torch_eplb.values.errors import EPLBError

__all__ = ["Roster"]

# By group: the models that are wrapped there, by number. The same on all ranks, since wrapping and
# unwrapping are collective. A model that is closed may still run, and one that was dropped may have
# been dropped on this rank only, so both stay, until a wrap finds them gone on all ranks.
_models: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, _Entry]] = (
    weakref.WeakKeyDictionary()
)
_SHIFT = 40  # a position (step times layers) is less than 2^40


@dataclass(frozen=True)
class _Entry:
    name: str
    num_layers: int
    roster: weakref.ref[Roster]  # lives as long as the model's hooks


class Roster:
    """One model's place among those of its group. Made on all ranks alike.

    Args:
        comm: gives the group.
        name: of the model, for messages.
        num_layers: its MoE layers.
    """

    def __init__(self, comm: Communicator, name: str, num_layers: int) -> None:
        self._comm = comm
        self._models = _models.setdefault(comm.group, {})
        self._number = max(self._models, default=-1) + 1
        self._forget_dropped()
        name = f"{name} (number {self._number})"
        self._models[self._number] = _Entry(name, num_layers, weakref.ref(self))

    def _forget_dropped(self) -> None:
        if not self._models:
            return
        dropped = [number for number, entry in self._models.items() if entry.roster() is None]
        everyone = gather_json(self._comm, dropped)
        for number in set(dropped).intersection(*everyone):
            del self._models[number]

    def leave(self) -> None:
        """The model is unwrapped, on all ranks."""
        self._models.pop(self._number, None)

    def call(self, position: int) -> None:
        """Where there are several models: make sure that all ranks are in this one.

        Args:
            position: `Position.at` this layer.

        Raises:
            EPLBError: on every rank, before anything else was exchanged; names the models, and
                where each rank is.
        """
        if len(self._models) < 2:
            return
        comm = self._comm
        comm.check_process()
        mine = torch.tensor([self._number << _SHIFT | position], device=comm.device)
        everyone = mine.new_empty(comm.num_ranks)
        work = all_gather_single(everyone, mine, group=comm.group, async_op=True)
        comm.wait_in_line(work)
        codes = everyone.tolist()
        if len({code >> _SHIFT for code in codes}) == 1:
            return
        where = "; ".join(
            f"rank {rank} in {self._describe(code)}" for rank, code in enumerate(codes)
        )
        raise EPLBError(
            f"ranks are in different models of one process group: {where}. Run wrapped models in "
            "the same order on all ranks (balancer.idle_step() where one has nothing to do), or "
            "wrap them on groups of their own. Nothing was exchanged"
        )

    def _describe(self, code: int) -> str:
        entry = self._models[code >> _SHIFT]
        step, layer = divmod(code & (1 << _SHIFT) - 1, entry.num_layers)
        return f"layer {layer} of {entry.name}" + (f", step {step - 1}" if step else "")
