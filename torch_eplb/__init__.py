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
    from torch_eplb.config import Config
    from torch_eplb.errors import EPLBError, PeerLostError
    from torch_eplb.layers.spec import register_layer
    from torch_eplb.metrics import Stats
    from torch_eplb.placement import Placement
    from torch_eplb.planning.plan import Plan, Topology
    from torch_eplb.pretrained import load_pretrained
    from torch_eplb.sharded import PlacementState, ShardedState

_HOMES = {
    "Config": "config",
    "EPLBError": "errors",
    "ExpertLoadBalancer": "balancer",
    "PeerLostError": "errors",
    "Placement": "placement",
    "PlacementState": "sharded",
    "Plan": "planning.plan",
    "ShardedState": "sharded",
    "Stats": "metrics",
    "Topology": "planning.plan",
    "load_pretrained": "pretrained",
    "register_layer": "layers.spec",
    "wrap": "balancer",
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
    "load_pretrained",
    "register_layer",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in ("testing", "trace", "simulate", "plot"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
