"""Our policies inside SGLang: ``eplb_algorithms.rebalance_experts``.

The interface as released in SGLang 0.5.23 (``sglang/srt/eplb/eplb_algorithms/__init__.py``)::

    def rebalance_experts(tokens_per_expert, num_physical_experts, num_local_physical_experts,
                          num_groups, num_nodes, algorithm)
        -> (physical_to_logical_map, logical_to_all_physical_map, expert_count)

``tokens_per_expert [steps, layers, experts]`` covers every layer of the model, dense ones without
load too, and is summed over the ranks, each of which plans for itself: equal inputs give equal
plans. The live map is not passed; it is read where SGLang keeps it
(``get_global_expert_location_metadata().physical_to_logical_map_cpu``).

    from torch_eplb.adapters import sglang; sglang.install("flow")      # in every process

or, since SGLang runs plugins in all of its processes, ``TORCH_EPLB_POLICY=flow`` before
``python -m sglang.launch_server ...``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.adapters.planning import Planner, replica_tables

if TYPE_CHECKING:
    import torch

__all__ = ["install", "rebalancer"]

Rebalance = Callable[..., "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"]


def rebalancer(
    policy: str | Callable[..., Any] = "flow",
    *,
    fallback: Rebalance | None = None,
    **options: Any,
) -> Rebalance:
    """A function with the signature of SGLang's ``rebalance_experts``.

    Args:
        policy: a name or a callable, as in ``wrap(policy=...)``.
        fallback: answers instead where the algorithm is an elastic one, which plans around ranks
            that have left.
        **options: ``replica_choice``, ``min_gain``, ``target_par``, ``max_moves``,
            ``plan_seconds``; see `Planner`.

    Raises:
        TypeError, ValueError: a wrong policy or option.
    """
    planner = Planner(policy, **options)

    def rebalance_experts(
        tokens_per_expert: torch.Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the module's docstring."""
        import torch

        if fallback is not None and "elastic" in str(getattr(algorithm, "name", algorithm)):
            return fallback(
                tokens_per_expert=tokens_per_expert,
                num_physical_experts=num_physical_experts,
                num_local_physical_experts=num_local_physical_experts,
                num_groups=num_groups,
                num_nodes=num_nodes,
                algorithm=algorithm,
            )
        placement = planner.plan(
            tokens_per_expert.detach().cpu().numpy(),
            _live_map(),
            num_slots=num_physical_experts,
            num_ranks=num_physical_experts // num_local_physical_experts,
            num_nodes=num_nodes,
            num_groups=num_groups or 1,
        )
        physical, logical, counts = map(torch.from_numpy, replica_tables(placement))
        return physical, logical, counts

    return rebalance_experts


def _live_map() -> NDArray[np.int64] | None:
    """``[layers, slots]``; None before SGLang has a map, or outside of it."""
    module = sys.modules.get("sglang.srt.eplb.expert_location")
    metadata = None if module is None else module.get_global_expert_location_metadata()
    return None if metadata is None else metadata.physical_to_logical_map_cpu.numpy()


def install(policy: str | Callable[..., Any] = "flow", **options: Any) -> Rebalance:
    """Makes SGLang of this process plan with ``policy``, whatever ``--eplb-algorithm`` says.

    Elastic algorithms stay SGLang's.

    Raises:
        ImportError: SGLang, or its ``eplb_algorithms``, cannot be imported.
    """
    try:
        module: Any = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
        theirs = getattr(module.rebalance_experts, "_theirs", module.rebalance_experts)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"SGLang's eplb_algorithms cannot be imported ({error}); the adapter was written for "
            "SGLang 0.5.23"
        ) from error
    ours: Any = rebalancer(policy, fallback=theirs, **options)
    ours._theirs = theirs  # so that installing twice does not stack
    module.rebalance_experts = ours
    return ours
