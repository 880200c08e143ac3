"""Where this rank is, in which forward and how far, and how ranks notice that they are apart."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence

from torch_eplb.layers.graphs import register
from torch_eplb.values.errors import EPLBError

__all__ = ["Position", "Progress"]

logger = logging.getLogger("torch_eplb")

_MOST_UNSEEN = 10  # forwards without a layer; some inputs may reach none
_MOST_PASSES = 100  # through all layers without a forward; a layer may be called more than once


class Progress(enum.Enum):
    """How far a forward has come."""

    IDLE = "no forward is under way"
    BEGUN = "nothing has been exchanged with other ranks"
    BETWEEN_LAYERS = "others may wait for this rank in a layer that is to come"
    PAST_LAYERS = "whatever is exchanged has been"


class Position:
    """The step clock of one rank.

    Args:
        num_layers: MoE layers of the model.

    Attributes:
        step: the forward to come, counted from 0: boundaries that this rank has passed.
        counts: False where steps are no longer compared, because balancing has ended.
        progress: of the forward under way. A forward in a compiled graph is not told from none.
        latest_step: the latest step in which another rank was met that was not in ours.
        entries: how often layers were entered since the last boundary, outside of graphs.
        traced: hooks of layers are a part of graphs, whose entries are not seen.
        number: for `graphs.note_traced`.
        stalled: why steps and layers do not go together, or None.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self.step = 0
        self.counts = True
        self.progress = Progress.IDLE
        self.latest_step = -1
        self.entries = 0
        self.traced = False
        self.number = register(self)
        self.stalled: str | None = None
        self._is_forward = False  # the step under way is a forward, whose hooks are seen
        self._unseen = 0
        self._most_entries = _MOST_PASSES * num_layers

    @property
    def is_behind(self) -> bool:
        """Whether other ranks were met in a forward that this one has not made."""
        return self.step <= self.latest_step

    def begin(self, is_forward: bool) -> None:
        """A boundary: were layers entered in the forward before it?

        Args:
            is_forward: False for a replay of a captured graph, which runs no hooks.
        """
        if self.entries:
            self._unseen, self.stalled = 0, None
        elif self._is_forward and not self.traced:
            self._unseen += 1
            if self._unseen == _MOST_UNSEEN:
                self._warn(
                    f"{_MOST_UNSEEN} forwards in a row have run no MoE layer's hooks",
                    "nothing is counted, and tokens do not find experts that are not in their "
                    "first place. Compile and capture the model after wrapping it, and call its "
                    "modules rather than their forward",
                )
        self.entries, self._is_forward = 0, is_forward

    def count_entry(self) -> None:
        """A layer is entered."""
        self.entries += 1
        if self.entries == self._most_entries and self.counts:
            self._warn(
                f"MoE layers were entered {self.entries} times without a step",
                "nothing is balanced, because whatever runs the model does not call the module "
                "whose forwards are its steps. Call balancer.step() before each pass through the "
                "layers, on every rank",
            )

    def _warn(self, reason: str, explanation: str) -> None:
        self.stalled = reason
        logger.warning("%s: %s", reason, explanation)

    def at(self, layer: int) -> int:
        """Where this rank is, in one integer that travels with its counts."""
        return (self.step if self.counts else 0) * self._num_layers + layer

    def enter(self, layer: int) -> int:
        """Exchange something from now on; returns `at`."""
        if self.progress is not Progress.IDLE:
            self.progress = Progress.BETWEEN_LAYERS
        return self.at(layer)

    def leave(self, layer: int) -> None:
        """The layer's results are back."""
        if layer == self._num_layers - 1:
            self.exchanged()

    def exchanged(self) -> None:
        """Something was exchanged, and nobody waits for anything now."""
        if self.progress is not Progress.IDLE:
            self.progress = Progress.PAST_LAYERS

    def compare(self, positions: Sequence[int]) -> None:
        """Refuse to go on where ranks are not in the same layer of the same step.

        Otherwise, when an exception stopped a forward on one rank only, tokens would meet the
        experts of another layer.

        Args:
            positions: what `enter` returned, of every rank.

        Raises:
            EPLBError: on every rank, in the same exchange, before any token has travelled.
        """
        steps = [position // self._num_layers - 1 for position in positions]
        layers = {position % self._num_layers for position in positions}
        counted = {step for step in steps if step >= 0} or {-1}
        if len(layers) == 1 and len(counted) == 1:
            return
        self.latest_step = max(steps)
        where = "; ".join(
            f"rank {rank} in layer {position % self._num_layers}"
            + (f" of step {step}" if step >= 0 else "")
            for rank, (position, step) in enumerate(zip(positions, steps, strict=True))
        )
        raise EPLBError(
            f"ranks are not in the same forward: {where}. A forward has raised on some ranks only, "
            "or was not made by every rank (a rank without work makes an empty one, or "
            "balancer.idle_step()), or has skipped layers that only some inputs reach (give every "
            "rank an input that does, a blank image say). Nothing was exchanged; go on with the "
            "next forward on every rank"
        )
