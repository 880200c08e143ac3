"""Expert-parallel load balancing for Mixture-of-Experts models.

    model = torch_eplb.wrap(model, num_redundant_experts=16)

Names are loaded when they are first used: the planner process imports parts of this package and
must not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch_eplb.version import __version__

if TYPE_CHECKING:
    from torch_eplb.balancer import ExpertLoadBalancer, wrap
    from torch_eplb.layers.spec import register_layer
    from torch_eplb.policies.rebalance import from_rebalance_experts, rebalance_experts
    from torch_eplb.runtime.config import Config
    from torch_eplb.state.dcp import PlacementState, ShardedState
    from torch_eplb.state.full import full_state_dict
    from torch_eplb.state.pretrained import load_pretrained
    from torch_eplb.values.errors import EPLBError, PeerLostError
    from torch_eplb.values.metrics import Stats
    from torch_eplb.values.placement import Placement
    from torch_eplb.values.plan import Plan, Topology

_HOMES = {
    "Config": "runtime.config",
    "EPLBError": "values.errors",
    "ExpertLoadBalancer": "balancer",
    "PeerLostError": "values.errors",
    "Placement": "values.placement",
    "PlacementState": "state.dcp",
    "Plan": "values.plan",
    "ShardedState": "state.dcp",
    "Stats": "values.metrics",
    "Topology": "values.plan",
    "from_rebalance_experts": "policies.rebalance",
    "full_state_dict": "state.full",
    "load_pretrained": "state.pretrained",
    "rebalance_experts": "policies.rebalance",
    "register_layer": "layers.spec",
    "wrap": "balancer",
}

# Modules that the documentation names, as attributes of the package.
_MODULES = {
    "adapters": "adapters",
    "expert_map": "files.expert_map",
    "exporters": "exporters",
    "materialize": "state.materialize",
    "plot": "offline.plot",
    "simulate": "offline.simulate",
    "testing": "testing",
    "trace": "files.trace",
}

__all__ = [
    "Config",
    "EPLBError",
    "ExpertLoadBalancer",
    "PeerLostError",
    "Placement",
    "PlacementState",
    "Plan",
    "ShardedState",
    "Stats",
    "Topology",
    "__version__",
    "from_rebalance_experts",
    "full_state_dict",
    "load_pretrained",
    "rebalance_experts",
    "register_layer",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
