"""DeepSeek's ``rebalance_experts``, both ways: our policies under its name, and its kind as policy.

Its arguments and its three arrays are what the field's balancers speak to each other:
https://github.com/deepseek-ai/EPLB. Tensors go in and come out, but nothing imports torch here
unless a caller's function asks for tensors.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.deepseek import groups_on_nodes, node_bound, part_siblings, published
from torch_eplb.policies.registry import PolicyError, make_policy
from torch_eplb.values.arrays import host_array
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["RebalancePolicy", "from_rebalance_experts", "rebalance_experts"]


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: str | Callable[..., Any] = "deepseek",
    current: Any = None,
    replica_choice: str = "even",
    min_gain: float | None = None,
    target_par: float | None = None,
    max_moves: int | None = None,
    plan_seconds: float | None = None,
) -> tuple[Any, Any, Any]:
    """Where every expert should be: DeepSeek's entry point, so that ours can stand in for theirs.

    With ``policy="deepseek"`` it is the published algorithm, choice by choice, except perhaps where
    loads are equal. It may put two replicas of an expert on one GPU; no other policy does, unless a
    GPU has more slots than there are experts.

    Args:
        weight: ``[layers, experts]``, tokens routed to each logical expert, or
            ``[samples, layers, experts]``. A numpy array, nested lists, or a torch tensor on any
            device.
        num_replicas: physical experts, a multiple of ``num_gpus``.
        num_groups: expert groups of the router. If it is no multiple of ``num_nodes``, groups and
            nodes do not count; else whole groups are kept on nodes.
        num_nodes: nodes that the GPUs sit on, equally many on each.
        num_gpus: ranks.
        policy: a name from `torch_eplb.Config`'s ``policy``, or a callable like there.
        current: the ``phy2log`` that is live now. "flow" moves away from it only what pays; with
            every policy, an expert that stays on its GPU keeps its slot. None: nothing is live,
            and moves cost nothing.
        replica_choice: how tokens will be shared among replicas, by which "flow" judges.
        min_gain, target_par, max_moves, plan_seconds: as in `torch_eplb.Config`, for "flow".

    Returns:
        ``phy2log`` ``[layers, num_replicas]``, the expert of every physical one; ``log2phy``
        ``[layers, experts, most replicas]``, the physical experts of every expert, ascending,
        filled up with -1; ``logcnt`` ``[layers, experts]``, how many they are. All int64, torch
        tensors on the CPU if ``weight`` is a torch tensor, else numpy arrays.

    Raises:
        TypeError, ValueError: an argument is not of this form; the message names it.

    The example of DeepSeek's README, with its very numbers:

        >>> weight = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        ...           [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
        >>> phy2log, log2phy, logcnt = rebalance_experts(weight, 16, 4, 2, 8)
        >>> phy2log
        array([[ 5,  6,  5,  7,  8,  4,  3,  4, 10,  9, 10,  2,  0,  1, 11,  1],
               [ 7, 10,  6,  8,  6, 11,  8,  9,  2,  4,  5,  1,  5,  0,  3,  1]])
        >>> logcnt[0].tolist()
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
        >>> log2phy.shape, log2phy[0, :2].tolist()
        ((2, 12, 2), [[12, -1], [13, 15]])
    """
    load = _load(weight)
    _, layers, experts = load.shape
    topology = _topology(experts, num_replicas, num_groups, num_nodes, num_gpus)
    live = None
    if current is not None:
        live = _live(current, layers, num_replicas, num_gpus, experts)
    if policy == "deepseek":
        physical = published(
            load.mean(axis=0),
            num_replicas, topology.num_expert_groups, topology.num_nodes, num_gpus,
        )  # fmt: skip
        placed = Placement.from_phy2log(physical, num_gpus, experts, allow_duplicates=True)
        placed = placed if live is None else live.align(placed)
    else:
        if live is None:
            live = Placement.initial(layers, experts, num_gpus, num_replicas // num_gpus)
            min_gain = 0.0 if min_gain is None else min_gain
        plan = make_policy(
            policy,
            replica_choice=replica_choice,
            min_gain=min_gain,
            target_par=target_par,
            max_moves=max_moves,
            plan_seconds=plan_seconds,
        )
        placed = plan(load, live, topology).placement
    phy2log, log2phy, logcnt = placed.phy2log, placed.log2phy, placed.logcnt
    if not _is_tensor(weight):
        return phy2log, log2phy, logcnt
    return _tensor(phy2log), _tensor(log2phy), _tensor(logcnt)


def from_rebalance_experts(
    function: Callable[..., Any],
    *,
    tensors: bool | None = None,
    current: str | None = None,
    **fixed: Any,
) -> RebalancePolicy:
    """A function with DeepSeek's signature as a policy: ``wrap(..., policy=this(function))``.

    It is called as ``function(weight, num_replicas, num_groups, num_nodes, num_gpus, **fixed)``,
    with the mean of the window's samples ``[layers, experts]`` as weight, and answers the three
    arrays, of which ``phy2log`` is read, or ``phy2log`` alone. Replicas of one expert that it puts
    on one rank are parted: they change places with experts of like load, within the node where
    groups are kept on nodes.

    The planner process runs it if it can be imported by name (from a module that is not
    ``__main__``) and ``fixed`` can be written as JSON; else a thread of rank 0 does.

    Args:
        function: theirs; its names for the five arguments do not matter.
        tensors: whether ``function`` takes torch tensors (float32, on the CPU) instead of numpy
            arrays (float64). None: if the annotation of its first argument says ``Tensor``. What it
            answers may be either. A planner process with torch in it takes some 200 MB more.
        current: name of the parameter, if it has one, that takes the live ``phy2log``, for
            functions that move few experts.
        fixed: further keyword arguments, passed on at every call.

    Raises:
        TypeError: ``function`` cannot be called like this.

    >>> def in_order(weight, num_replicas, num_groups, num_nodes, num_gpus):
    ...     phy2log = np.arange(num_replicas)[None] % weight.shape[1]
    ...     return phy2log.repeat(len(weight), axis=0), None, None
    >>> policy = from_rebalance_experts(in_order)
    >>> policy(np.ones((1, 1, 4)), Placement.initial(1, 4, 2, 3), Topology(2)).experts.tolist()
    [[[0, 1, 2], [3, 0, 1]]]
    """
    if not callable(function):
        raise TypeError(f"from_rebalance_experts takes a function, got {function!r}")
    given = fixed if current is None else {**fixed, current: None}
    try:
        signature = inspect.signature(function)
    except ValueError:  # made in C: it will say so itself
        signature = None
    if signature is not None:
        try:
            signature.bind(*[None] * 5, **given)
        except TypeError as error:
            raise TypeError(
                f"{_name_of(function)} cannot be called with (weight, num_replicas, num_groups, "
                f"num_nodes, num_gpus) and the keywords {sorted(given)}: {error}; the five follow "
                "from the model and from wrap's num_nodes and num_expert_groups"
            ) from error
    if tensors is None:
        first = next(iter(signature.parameters.values())) if signature is not None else None
        tensors = first is not None and "Tensor" in str(first.annotation)
    return RebalancePolicy(function, tensors, current, fixed)


@dataclass(frozen=True, eq=False)
class RebalancePolicy:
    """What `from_rebalance_experts` makes; its arguments are the attributes."""

    function: Callable[..., Any]
    tensors: bool
    current: str | None
    fixed: Mapping[str, Any]

    def __post_init__(self) -> None:
        # By this ranks compare their policies.
        object.__setattr__(self, "__qualname__", repr(self))

    def __call__(
        self, load: NDArray[np.float64], placement: Placement, topology: Topology
    ) -> Placement:
        """The placement for ``load [samples, layers, experts]``.

        Raises:
            PolicyError: the function's answer is no placement for these experts and ranks.
        """
        weight = load.mean(axis=0)
        live = placement.phy2log
        keywords = dict(self.fixed)
        if self.current is not None:
            keywords[self.current] = _tensor(live) if self.tensors else live
        answer = self.function(
            _tensor(weight.astype(np.float32)) if self.tensors else weight,
            live.shape[1],
            topology.num_expert_groups,
            topology.num_nodes,
            topology.num_ranks,
            **keywords,
        )
        phy2log = answer[0] if isinstance(answer, tuple) else answer
        try:
            placed = Placement.from_phy2log(
                phy2log, placement.num_ranks, placement.num_experts, allow_duplicates=True
            )
        except (TypeError, ValueError) as error:
            raise PolicyError(
                f"the answer of {_name_of(self.function)} is wrong: {error}"
            ) from error
        if placed.experts.shape != placement.experts.shape:
            raise PolicyError(
                f"the answer of {_name_of(self.function)} is wrong: phy2log must have the shape "
                f"[layers, num_replicas] = {list(live.shape)}, got {list(placed.phy2log.shape)}"
            )
        return _parted(placed, weight, topology)

    def __repr__(self) -> str:
        options: dict[str, Any] = {"tensors": self.tensors, "current": self.current, **self.fixed}
        listed = "".join(f", {name}={value!r}" for name, value in options.items())
        return f"from_rebalance_experts({_name_of(self.function)}{listed})"


def _load(weight: Any) -> NDArray[np.float64]:
    """``weight`` as ``[samples, layers, experts]``."""
    if _is_tensor(weight):
        weight = weight.detach().cpu().double()  # numpy has no bfloat16
    try:
        array = host_array(weight)
    except ValueError as error:
        raise ValueError(f"weight must be an array [layers, experts]: {error}") from error
    if array.dtype.kind not in "iufb":
        raise TypeError(f"weight must be an array of numbers, got dtype {array.dtype}")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            "weight must have the shape [layers, experts] or [samples, layers, experts], each at "
            f"least 1, got {list(array.shape)}"
        )
    load = array.astype(np.float64).reshape(-1, *array.shape[-2:])
    wrong = ~(np.isfinite(load) & (load >= 0))
    if wrong.any():
        sample, layer, expert = np.argwhere(wrong)[0]
        raise ValueError(
            f"weight must be finite and not negative, got {load[sample, layer, expert]} at "
            + (f"sample {sample}, " if array.ndim == 3 else "")
            + f"layer {layer}, expert {expert}"
        )
    return load


def _topology(
    experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Topology:
    """The topology that counts, once the numbers divide."""
    for value, name in (
        (num_replicas, "num_replicas"),
        (num_groups, "num_groups"),
        (num_nodes, "num_nodes"),
        (num_gpus, "num_gpus"),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for many, what, few, of in (
        (num_replicas, "num_replicas", num_gpus, "num_gpus"),
        (experts, "experts", num_groups, "num_groups"),
        (num_gpus, "num_gpus", num_nodes, "num_nodes"),
    ):
        if many % few:
            raise ValueError(f"{what} ({many}) must be a multiple of {of} ({few})")
    if num_replicas < experts:
        raise ValueError(f"num_replicas ({num_replicas}) cannot hold {experts} experts")
    return Topology(num_gpus, num_nodes, num_groups)


def _live(current: Any, layers: int, num_replicas: int, num_gpus: int, experts: int) -> Placement:
    array = host_array(current)
    if array.shape != (layers, num_replicas):
        raise ValueError(
            f"current must have the shape [layers, num_replicas] = [{layers}, {num_replicas}], "
            f"got {list(array.shape)}"
        )
    try:
        return Placement.from_phy2log(array, num_gpus, experts, allow_duplicates=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"current is no placement: {error}") from error


def _parted(placement: Placement, weight: NDArray[np.float64], topology: Topology) -> Placement:
    """The placement without two replicas of an expert on a rank, where that can be.

    Groups stay on their nodes in layers that keep them there.
    """
    slots, experts = placement.num_slots, placement.experts.copy()
    if slots > placement.num_experts:
        return placement
    bound = np.zeros(placement.num_layers, dtype=bool)
    if node_bound(placement, topology):
        bound = groups_on_nodes(placement, topology)
    doubled = (placement.held().sum(axis=1) != slots).any(axis=1)
    for layer in np.flatnonzero(doubled).tolist():
        for ranks in np.split(experts[layer], topology.num_nodes if bound[layer] else 1):
            _part(ranks, weight[layer])
    return Placement(experts, placement.num_experts)


def _part(ranks: NDArray[np.int32], weight: NDArray[np.float64]) -> None:
    """Part the doubles of ``ranks [ranks, slots]``, in place.

    There are at least as many experts among them as a rank has slots.
    """
    most = len(ranks)
    counts = np.bincount(ranks.reshape(-1), minlength=len(weight))
    while counts.max() > most:
        # More replicas than ranks: one goes to the expert that has most load per replica.
        surplus = int(counts.argmax())
        rank = int((ranks == surplus).sum(axis=1).argmax())
        slot = int(np.flatnonzero(ranks[rank] == surplus)[-1])
        each = weight / np.maximum(counts, 1)
        each[(counts == 0) | (counts >= most)] = -1.0
        heir = int(each.argmax())
        ranks[rank, slot] = heir
        counts[surplus] -= 1
        counts[heir] += 1
    kind = ranks.reshape(-1).astype(np.int64)
    rank_of, slot_of = np.divmod(np.arange(kind.size), ranks.shape[1])
    part_siblings(rank_of, slot_of, kind, weight[kind] / counts[kind], most)
    ranks[rank_of, slot_of] = kind


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # what is a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _tensor(array: NDArray[Any]) -> Any:
    # Not a statement: the planner must not import torch unless a function wants its tensors.
    return importlib.import_module("torch").from_numpy(array)


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None)}.{name}"
