"""The ways of bringing tokens to experts, by name.

One class per way, all with the same two hooks. A worked example of `AllToAll` with 2 ranks of
3 slots, 4 experts, placement ``[[0, 1, 2], [3, 0, 1]]`` (so physical experts 0..5 hold
0 1 2 | 3 0 1), top-2::

    rank 0 has tokens a b for experts 0,3 and 0,2; rank 1 has token d for experts 0,1
    choose a replica:    a -> 0,3   b -> 0,2        d -> 4,5        (physical experts)
    one row per rank:    a b to rank 0, a to 1      d to rank 1
    rank 0 computes      a b in slot 0, b in 2;     rank 1: a in slot 0, d in slots 1 and 2
    weighted and summed  b of slots 0 and 2;        d of slots 1 and 2
    results travel back the same way, one row each, and a's two are added up at home.
"""

from __future__ import annotations

from torch_eplb.layers.all_gather import (
    AgreeingAllGather,
    AllGather,
    AskingAllGather,
    CompactAllGather,
)
from torch_eplb.layers.all_reduce import AllReduce, AskingAllReduce, CompactAllReduce
from torch_eplb.layers.all_to_all import AllToAll
from torch_eplb.layers.context import LayerContext
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.external import External
from torch_eplb.layers.hooks import BoundToRanks, Dispatch
from torch_eplb.values.choices import DispatchKind, DispatchName

__all__ = ["BoundToRanks", "Dispatch", "make_dispatch"]


def make_dispatch(
    layer: ExpertLayer, index: int, context: LayerContext, kind: DispatchKind
) -> Dispatch:
    """Install the hooks of one layer."""
    if kind.communicates:
        layer.compute_locally(context.tables.num_slots)
    return _classes(layer, context)[kind.name](layer, index, context)


def _classes(layer: ExpertLayer, context: LayerContext) -> dict[DispatchName, type[Dispatch]]:
    reducing = {True: AllReduce, False: CompactAllReduce, None: AskingAllReduce}
    sized = AgreeingAllGather if context.max_tokens_per_rank is None else AllGather
    gathering = {True: sized, False: CompactAllGather, None: AskingAllGather}
    return {
        "all_to_all": AllToAll,
        "all_reduce": reducing[layer.spec.skips_sentinel],
        "all_gather": gathering[layer.spec.skips_sentinel],
        "external": External,
    }
