"""Models on a device, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from support.few_kernels import (
    HIDDEN,
    ExternalExperts,
    FewKernelExperts,
    FewKernelModel,
    SentinelExperts,
)
from support.models import skewed_batch

import torch_eplb

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
_MOST_STEPS = 400


def make(
    experts: str = "FewKernelExperts", layers: int = 2, device: str = "npu"
) -> tuple[FewKernelModel, FewKernelModel]:
    """A model on the device and the same on the CPU, that nobody wraps."""
    kinds = {kind.__name__: kind for kind in (FewKernelExperts, SentinelExperts, ExternalExperts)}
    torch_eplb.register_layer(SentinelExperts, skips_sentinel=True)
    plain = FewKernelModel(FewKernelExperts, layers)
    model = FewKernelModel(kinds[experts], layers)
    model.load_state_dict(plain.state_dict())
    return model.to(device), plain


def serve(
    balancer: torch_eplb.ExpertLoadBalancer, plain: FewKernelModel, rank: int, rebalances: int
) -> None:
    """Forwards, each compared, until so many rebalances were made."""
    shared = balancer.eplb_config.dispatch == "all_reduce"
    device = next(balancer.parameters()).device
    with torch.inference_mode():
        for step in range(_MOST_STEPS):
            x = skewed_batch(8, HIDDEN, 10 * step + (0 if shared else rank))
            torch.testing.assert_close(balancer(x.to(device)).cpu(), plain(x), **CLOSE)
            if balancer.stats().rebalances >= rebalances:
                return
    raise AssertionError(f"{balancer.stats()}")


def assert_same(state: dict[str, torch.Tensor], plain: FewKernelModel) -> None:
    """A state dict is the plain model's."""
    expected = plain.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name].cpu(), value), name
