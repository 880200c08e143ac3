"""Several wrapped models on one process group: ranks say which one they are in.

A draft and a target model, say. Where all ranks run them in the same order, nothing has to be said.
But if one rank is in the first while another is in the second, what they exchange would meet: of
equal size it would be taken for the other's, of unequal size the backend ends the process. So
from the second model of a group on, every layer begins with a message of a fixed size.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from torch_eplb.comm.communicator import Communicator, all_gather_single
from torch_eplb.values.errors import EPLBError

__all__ = ["Roster"]

# By group: the names of the models that are wrapped there, by number. The same on all ranks, since
# wrapping and unwrapping are collective; a model that is closed or dropped may still run, or may
# have been dropped on this rank only, so it stays.
_models: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[str, int]]] = (
    weakref.WeakKeyDictionary()
)
_SHIFT = 40  # a position (step times layers) is less than 2^40


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
        self._models[self._number] = (f"{name} (number {self._number})", num_layers)

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
        name, num_layers = self._models[code >> _SHIFT]
        step, layer = divmod(code & (1 << _SHIFT) - 1, num_layers)
        return f"layer {layer} of {name}" + (f", step {step - 1}" if step else "")
