"""What the hooks of all MoE layers share, and how ranks notice that they are not together."""

from __future__ import annotations

from dataclasses import dataclass

from torch_eplb.comm.communicator import Communicator
from torch_eplb.routing import LoadCounters, RoutingTables
from torch_eplb.values.errors import EPLBError

__all__ = ["RoutingState"]


@dataclass
class RoutingState:
    """What the hooks of all layers share.

    Attributes:
        comm: the process groups.
        tables: routing tables of all layers, updated in place.
        counters: load counters of all layers, updated in place.
        replica_choice: see `torch_eplb.Config`.
        num_slots: slots per rank.
        step: the step under way; -1 where steps are no longer counted. Same on all ranks that
            count.
        entered: whether this rank has exchanged anything with the others in this step.
        between_layers: whether it has, and other ranks may wait for it in a layer that is to come.
        latest_step: the latest step in which another rank was met that was not in ours.
    """

    comm: Communicator
    tables: RoutingTables
    counters: LoadCounters
    replica_choice: str
    num_slots: int
    step: int = -1
    entered: bool = False
    between_layers: bool = False
    latest_step: int = -1

    def enter(self, layer: int) -> int:
        """Exchange something from now on. Returns where this rank is, in one integer that travels
        with its counts."""
        self.entered = self.between_layers = True
        return (self.step + 1) * self.tables.num_layers + layer

    def leave(self, layer: int) -> None:
        """The layer's results are back."""
        self.between_layers = layer < self.tables.num_layers - 1

    def compare(self, positions: list[int], layer: int) -> None:
        """Refuse to go on where ranks are not in the same layer of the same step.

        Otherwise, when an exception stopped a forward on one rank only, tokens would meet the
        experts of another layer.

        Raises:
            EPLBError: on every rank, in the same exchange, before any token has travelled.
        """
        steps = [position // self.tables.num_layers - 1 for position in positions]
        layers = {position % self.tables.num_layers for position in positions}
        counted = {step for step in steps if step >= 0} or {-1}
        if self.comm.fake or (len(layers) == 1 and len(counted) == 1):
            return
        self.latest_step = max(steps)
        where = "; ".join(
            f"rank {rank} in layer {position % self.tables.num_layers}"
            + (f" of step {step}" if step >= 0 else "")
            for rank, (position, step) in enumerate(zip(positions, steps, strict=True))
        )
        raise EPLBError(
            f"ranks are not in the same forward: {where}. A forward has raised on some ranks only, "
            "or was not made by every rank. Nothing was exchanged; go on with the next forward on "
            "every rank"
        )
