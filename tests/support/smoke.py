"""A program for an environment in which torch_eplb is installed: is all of it there, does it run?

It is given the repository's folder, whose sources must not be what runs. (tox may well have made
the environment inside that folder.)
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
from torch import nn

import torch_eplb
from torch_eplb.testing import fake_process_group, run_until


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 8
        self.up = nn.Parameter(torch.randn(8, 16, 16) / 4)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            part = hidden_states[token] @ self.up[expert] * top_k_weights[token, choice, None]
            out = out.index_add(0, token, part)
        return out


def main() -> None:
    folder = Path(torch_eplb.__file__).parent
    source = Path(sys.argv[1]).resolve() / "torch_eplb"
    assert folder.resolve() != source, f"torch_eplb comes from {folder}, not from the wheel"
    assert (folder / "py.typed").is_file()
    distribution = importlib.metadata.distribution("torch-eplb")
    assert distribution.version == torch_eplb.__version__
    plugins = {point.group: point for point in distribution.entry_points}
    assert set(plugins) == {"vllm.general_plugins", "sglang.srt.plugins"}
    for point in plugins.values():
        point.load()()  # does nothing without TORCH_EPLB_POLICY
    options = {"num_redundant_experts": 4, "collect_interval": 4, "plan_interval": 1}
    with fake_process_group(world_size=4), torch.no_grad():
        balancer = torch_eplb.wrap(Experts(), policy="random", **options)  # type: ignore[arg-type]
        ids, ones = torch.arange(8).view(4, 2), torch.ones(4, 2)
        run_until(
            lambda: balancer.stats().rebalances >= 1,
            lambda: balancer(torch.randn(4, 16), ids, ones),
        )
        assert balancer.stats().experts_moved > 0
        print(balancer.report())
        balancer.close()


if __name__ == "__main__":
    main()
