"""Experts that are held one by one on the device, in plain order and in tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from npu_sim.ranks import run_on_npus
from support.few_kernels import EXPERTS, FewKernelModel, gather_slots
from support.listed import TENSORS, ListedOutside, first_slots, make_listed
from support.models import QUICK
from support.on_device import serve
from torch import nn

import torch_eplb

ND, TILES = 2, 29


def plain_order(entry: torch.Tensor) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_format_cast(entry.detach(), ND)


class TiledOutside(ListedOutside):
    """Simulated operators read memory as it lies, so that tiles are brought into order first."""

    def slots(self) -> list[torch.Tensor]:
        up = torch.stack([plain_order(entry) for entry in self.up])
        others = [torch.stack(list(getattr(self, name))) for name in TENSORS[1:]]
        return [gather_slots(tensor) for tensor in (up, *others)]


def make(
    rank: int, world_size: int, tiles: bool, redundant: int
) -> tuple[FewKernelModel, FewKernelModel]:
    import torch_npu

    torch.npu.config.allow_internal_format = True
    kind = TiledOutside if tiles else ListedOutside
    model, plain = make_listed(kind, first_slots(rank, world_size, redundant))
    model.to("npu")
    for layer in model.layers:
        experts: Any = layer.experts
        for name in TENSORS[1:]:
            held = getattr(experts, name)
            setattr(experts, name, type(held)(entry.npu() for entry in held))
        if tiles:
            experts.up = nn.ParameterList(
                nn.Parameter(torch_npu.npu_format_cast(entry.data, TILES), requires_grad=False)
                for entry in experts.up
            )
    return model, plain


def life(rank: int, world_size: int, tiles: bool, options: dict[str, Any]) -> None:
    import torch_npu

    options = {**QUICK, "dispatch": "external", "replica_choice": "table", **options}
    model, plain = make(rank, world_size, tiles, options["num_redundant_experts"])
    with torch_eplb.wrap(model, **options) as balancer:
        before = balancer.engine.layers[0].tensors()
        addresses = [tensor.data_ptr() for tensor in before]
        serve(balancer, plain, rank, 2)
        assert balancer.stats().bytes_received > 0
        after = balancer.engine.layers[0].tensors()
        assert all(a is b for a, b in zip(after, before, strict=True))
        assert [tensor.data_ptr() for tensor in after] == addresses
        formats = {int(torch_npu.get_npu_format(entry)) for entry in model.layers[0].experts.up}
        assert formats == {TILES if tiles else ND}
        state = balancer.state_dict()
        on_rank_0 = torch_eplb.full_state_dict(balancer, rank0_only=True, cpu_offload=True)
        for index, layer in enumerate(plain.layers):
            for expert, value in enumerate(layer.experts.up):
                key = f"layers.{index}.experts.up.{expert}"
                assert torch.equal(plain_order(state[key]).cpu(), value)
                assert rank or torch.equal(on_rank_0[key], value)
                plain.layers[index].experts.up[expert] = state[key] = -value // 2
        balancer.load_state_dict(state)
        serve(balancer, plain, rank, 3)
        unwrapped = balancer.unwrap()
    for layer, reference in zip(unwrapped.layers, plain.layers, strict=True):
        for name in TENSORS:
            entries = getattr(layer.experts, name)
            assert len(entries) == EXPERTS
            if name == "up":
                assert {int(torch_npu.get_npu_format(entry)) for entry in entries} == formats
            whole = torch.stack([plain_order(entry).cpu() for entry in entries])
            assert torch.equal(whole, getattr(reference.experts, name))


@pytest.mark.parametrize(
    ("tiles", "options", "coalesced"),
    [
        (False, {}, True),
        (True, {}, True),
        (True, {"verify": True, "overlap": False}, False),
        (True, {"transport": "gloo"}, True),
    ],
    ids=str,
)
def test_lists_move_in_place_in_whatever_format(
    tiles: bool, options: dict[str, Any], coalesced: bool
) -> None:
    run_on_npus(life, 2, tiles, options, coalesced=coalesced)


def mixed(rank: int, world_size: int) -> None:
    import torch_npu

    model, _ = make(rank, world_size, tiles=True, redundant=0)
    experts: Any = model.layers[1].experts
    experts.up[3] = nn.Parameter(plain_order(experts.up[3]), requires_grad=False)
    assert torch_npu.get_npu_format(experts.up[3]) == ND
    with pytest.raises(ValueError, match=r"up\.3 is .*, but .*up\.0 is .*:format 29"):
        torch_eplb.wrap(model, dispatch="external", timeout=20)


def test_lists_of_mixed_formats_are_refused() -> None:
    run_on_npus(mixed, 1)
