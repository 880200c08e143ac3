"""Our policies inside vLLM: ``AbstractEplbPolicy.rebalance_experts``.

The interface as released in vLLM 0.33.0 (``vllm/distributed/eplb/policy/abstract.py``)::

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks,
                          old_global_expert_indices=None) -> torch.Tensor

``weight [layers, experts]`` is the sum over the window and all ranks, on the CPU, and so is the
answer ``[layers, num_replicas]``, the logical expert of every slot. The load of single steps is not
passed on, so policies that judge on samples see one. ``old_global_expert_indices [layers, slots]``
is the live map; -1 is a slot that an elastic group has not filled. vLLM takes policies from the
dict ``EPLB_POLICIES`` by ``--eplb-config.policy``, which may be "default" only.

    from torch_eplb.adapters import vllm; vllm.install("flow")      # in every process

or, since vLLM runs plugins in all of its processes, ``TORCH_EPLB_POLICY=flow vllm serve ...``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_eplb.adapters.planning import Planner, replica_tables

if TYPE_CHECKING:
    import torch

__all__ = ["install", "policy_class"]


def policy_class(policy: str | Callable[..., Any] = "flow", **options: Any) -> type:
    """A policy class for vLLM.

    Args:
        policy: a name or a callable, as in ``wrap(policy=...)``.
        **options: ``replica_choice``, ``min_gain``, ``target_par``, ``max_moves``,
            ``plan_seconds``; see `Planner`.

    Raises:
        TypeError, ValueError: a wrong policy or option.
    """
    planner = Planner(policy, **options)

    class EplbPolicy(_abstract_policy()):  # type: ignore[misc]
        """Plans with torch_eplb."""

        @classmethod
        def rebalance_experts(
            cls,
            weight: torch.Tensor,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """See the module's docstring."""
            import torch

            old = old_global_expert_indices
            placement = planner.plan(
                weight.detach().cpu().double().numpy(),
                None if old is None else old.detach().cpu().numpy(),
                num_slots=num_replicas,
                num_ranks=num_ranks,
                num_nodes=num_nodes,
                num_groups=num_groups,
            )
            return torch.from_numpy(np.ascontiguousarray(replica_tables(placement)[0]))

    return EplbPolicy


def _abstract_policy() -> type:
    """vLLM's base class where vLLM is, so that its own checks see one of theirs."""
    try:
        module = importlib.import_module("vllm.distributed.eplb.policy.abstract")
    except ImportError:
        return object
    return module.AbstractEplbPolicy


def install(
    policy: str | Callable[..., Any] = "flow", *, name: str = "default", **options: Any
) -> type:
    """Makes vLLM of this process plan with ``policy``.

    Args:
        policy, options: as `policy_class`.
        name: which of vLLM's policies it stands in for.

    Returns:
        The class.

    Raises:
        ImportError: vLLM, or its ``EPLB_POLICIES``, cannot be imported.
    """
    try:
        registry = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"vLLM's EPLB_POLICIES cannot be imported ({error}); the adapter was written for vLLM "
            "0.33"
        ) from error
    registry[name] = policy_class(policy, **options)
    return registry[name]
