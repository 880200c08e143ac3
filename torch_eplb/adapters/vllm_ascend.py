"""Our policies inside vLLM-Ascend: ``EplbPolicy.rebalance_experts`` of its policy factory.

The interface as released in vLLM-Ascend 0.23.0 (``vllm_ascend/eplb/core/policy``, called by
``eplb_worker.py``)::

    def rebalance_experts(self, current_expert_table, expert_workload)
        -> (changed, priority of layers, new expert table)

``current_expert_table [layers, ranks, slots]`` holds logical ids; ``expert_workload`` is the load
of every slot, ``[layers, ranks, slots]``, or ``[stages, layers, ranks, slots]`` for policy type 3.
The worker keeps an old layer where the new one misses an expert, has two replicas on one rank, or
moves an expert within its rank; a plan of ours does neither. A policy that raises ends the worker,
and the server waits for it without end, so this one never does. (The model runner V2 plans with
vLLM's own interface: `torch_eplb.adapters.vllm`.)

    from torch_eplb.adapters import vllm_ascend; vllm_ascend.install("flow", policy_type=3)

or ``TORCH_EPLB_POLICY=flow`` before ``vllm serve ...``, with any ``eplb_policy_type``; 3 is the
one that passes on the load of single stages.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.adapters.planning import Planner
from torch_eplb.files.recorded import to_logical
from torch_eplb.policies.split import even_split, par, rank_loads
from torch_eplb.values.placement import Placement

if TYPE_CHECKING:
    import torch

__all__ = ["EplbPolicy", "install"]

logger = logging.getLogger("torch_eplb")

_CLASSES = {0: "RandomLoadBalance", 1: "DefaultEplb", 2: "SwiftBalanceEplb", 3: "FlashLB"}


class EplbPolicy:
    """Plans with torch_eplb; can be pickled, as vLLM-Ascend sends it to its planning process.

    Args:
        policy: a name or a callable, as in ``wrap(policy=...)``.
        ranks_per_node: for policies that look at nodes; None takes all ranks as one node.
        **options: ``replica_choice``, ``min_gain``, ``target_par``, ``max_moves``,
            ``plan_seconds``; see `Planner`.

    Raises:
        TypeError, ValueError: a wrong policy or option.
    """

    def __init__(
        self,
        policy: str | Callable[..., Any] = "flow",
        *,
        ranks_per_node: int | None = None,
        **options: Any,
    ) -> None:
        if ranks_per_node is not None and ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be at least 1, got {ranks_per_node}")
        self._planner = Planner(policy, **options)
        self._ranks_per_node = ranks_per_node

    def rebalance_experts(
        self, current_expert_table: Any, expert_workload: Any
    ) -> tuple[int, NDArray[np.int64], torch.Tensor]:
        """See the module's docstring.

        Returns:
            1 if a layer changes, else 0; the layers, those first whose PAR falls most; the table.
        """
        import torch

        table = np.asarray(current_expert_table)
        try:
            new, priority = self._plan(table, np.asarray(expert_workload))
        except Exception:
            # See the module's docstring.
            logger.exception("no new plan; the live expert table stays")
            new, priority = table, np.arange(len(table))
        changed = int((new != table).any())
        return changed, priority, torch.from_numpy(np.array(new, dtype=np.int64))

    def _plan(
        self, table: NDArray[Any], workload: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if table.ndim != 3 or workload.shape[-3:] != table.shape or workload.ndim > 4:
            raise ValueError(
                "expected a table [layers, ranks, slots] and as large a workload, perhaps with "
                f"stages before it; got the shapes {list(table.shape)} and {list(workload.shape)}"
            )
        layers, ranks, slots = table.shape
        flat = table.reshape(layers, -1).astype(np.int64)
        load = to_logical(workload.reshape(-1, layers, ranks * slots), flat)
        nodes = 1 if self._ranks_per_node is None else max(1, ranks // self._ranks_per_node)
        plan = self._planner.plan(
            load, flat, num_slots=ranks * slots, num_ranks=ranks, num_nodes=nodes
        )
        mean = load.mean(axis=0)
        after = _par(mean, plan)
        before = _par(mean, Placement(table, plan.num_experts, allow_duplicates=True))
        return plan.experts, np.argsort(after - before, kind="stable")


def _par(load: NDArray[Any], placement: Placement) -> NDArray[np.float64]:
    return par(rank_loads(load, placement, even_split(placement)))[0]


def install(
    policy: str | Callable[..., Any] = "flow",
    *,
    policy_type: int | None = None,
    **options: Any,
) -> None:
    """Makes vLLM-Ascend of this process (and the planning process it starts) plan with ``policy``.

    Args:
        policy, options: as `EplbPolicy`.
        policy_type: the ``eplb_policy_type`` that it stands in for; None: whichever is set.

    Raises:
        ImportError: vLLM-Ascend, or its policy factory, cannot be imported.
        ValueError: another policy type, or wrong options.
    """
    types = list(_CLASSES) if policy_type is None else [policy_type]
    if types[0] not in _CLASSES:
        raise ValueError(f"policy_type must be one of {list(_CLASSES)}, got {policy_type}")
    EplbPolicy(policy, **options)
    try:
        factory = importlib.import_module("vllm_ascend.eplb.core.policy.policy_factory")
        for number in types:
            getattr(factory, _CLASSES[number])
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"vLLM-Ascend's policy factory cannot be imported ({error}); the adapter was written "
            "for vLLM-Ascend 0.23"
        ) from error

    def build() -> EplbPolicy:
        return EplbPolicy(policy, **options)

    build.__name__ = f"torch_eplb ({policy})"  # the factory logs it
    for number in types:
        setattr(factory, _CLASSES[number], build)
