"""What is indexed by expert, seen by slot; and lists that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.few_kernels import EXPERTS, FewKernelModel
from support.listed import TENSORS, Listed, make_listed
from torch import nn

import torch_eplb
from torch_eplb.layers import slots
from torch_eplb.layers.finding import find_layers


def listed() -> tuple[FewKernelModel, Listed]:
    model, _ = make_listed(Listed, [list(range(EXPERTS))])
    experts: Any = model.layers[0].experts
    return model, experts


def test_a_list_is_what_a_stacked_tensor_is() -> None:
    stacked = torch.arange(24.0).view(4, 2, 3)
    one, other = slots.Stacked(stacked), slots.Listed([s.clone() for s in stacked])
    for part in (one, other, one.select(range(4)), other.select(range(4))):
        assert (len(part), part.slot_nbytes, part.inner_shape) == (4, 24, (2, 3))
        assert [part.slot(s).sum().item() for s in range(4)] == [15, 51, 87, 123]
    assert [type(one.empty(7, torch.device("cpu"))), len(other.empty(7, torch.device("cpu")))] == [
        slots.Stacked,
        7,
    ]


def test_a_selected_list_has_the_objects_and_copies_of_those_that_recur() -> None:
    entries = [nn.Parameter(torch.full((2,), float(i))) for i in range(4)]
    chosen = slots.Listed(entries).select([3, 1, 3]).tensors
    assert chosen[0] is entries[3]
    assert chosen[1] is entries[1]
    assert isinstance(chosen[2], nn.Parameter)
    assert chosen[2].data_ptr() != chosen[0].data_ptr()
    assert torch.equal(chosen[2], chosen[0])
    with torch.inference_mode():
        born_there = [torch.ones(2)]
    assert not slots.Listed(born_there).select([0]).slot(0).is_inference()


def test_lists_that_are_named_are_found() -> None:
    model, experts = listed()
    (layer,) = find_layers(model)
    assert layer.tensor_names == TENSORS
    assert layer.expert_bytes == 16 * 16 + 3 * 4 * 16
    names = [name for name, _ in layer.named_tensors()]
    assert names[:2] + names[-1:] == ["up.0", "up.1", "bias.7"]
    assert all(a is b for a, b in zip(layer.tensors()[:8], experts.up, strict=True))
    layer.slot_bytes(3)[2].copy_(layer.slot_bytes(5)[2])
    assert torch.equal(experts.up_offset[3], experts.up_offset[5])


def test_what_is_not_named_is_refused_with_the_remedy() -> None:
    model, experts = listed()
    torch_eplb.register_layer(Listed)
    with pytest.raises(ValueError, match=r"up_scale \(list\) .*or name it, if it is a list of ten"):
        find_layers(model)
    del experts.up_scale, experts.up_offset, experts.bias
    with pytest.raises(
        ValueError,
        match=r"up is a ParameterList .*only if they are named, with torch_eplb\.register",
    ):
        find_layers(model)


def other_shape(experts: Listed) -> None:
    experts.up_scale[3] = torch.rand(17, 1)


def other_dtype(experts: Listed) -> None:
    experts.up_scale[3] = experts.up_scale[3].double()


def other_strides(experts: Listed) -> None:
    experts.up[3] = nn.Parameter(experts.up[3].data.t(), requires_grad=False)


def no_tensor(experts: Listed) -> None:
    experts.bias[2] = [0.0]


def on_meta(experts: Listed) -> None:
    experts.up_scale = [scale.to("meta") for scale in experts.up_scale]


def empty(experts: Listed) -> None:
    experts.bias = []


def gaps(experts: Listed) -> None:
    experts.bias = [torch.zeros(16, 2)[:, :1] for _ in range(EXPERTS)]


def modules(experts: Listed) -> None:
    del experts.up
    experts.up = nn.ModuleList(nn.Linear(2, 2) for _ in range(EXPERTS))


def one_twice(experts: Listed) -> None:
    experts.bias[2] = experts.bias[6]


def overlapping(experts: Listed) -> None:
    both = torch.zeros(17, 1)
    experts.bias[2], experts.bias[6] = both[:16], both[1:]


def also_stacked(experts: Listed) -> None:
    experts.weight = nn.Parameter(torch.zeros(EXPERTS, 16, 1))
    experts.bias = list(experts.weight.detach().unbind(0))


def also_registered(experts: Listed) -> None:
    experts.register_buffer("bias_2", experts.bias[2])


REFUSED = {
    other_shape: r"up_scale\.3 is torch\.float32:\(17, 1\).* must be alike",
    other_dtype: r"up_scale\.3 is torch\.float64.* must be alike",
    other_strides: r"up\.3 is torch\.int8:\(16, 16\):\(1, 16\).* must be alike",
    no_tensor: r"bias\.2 is a list; the entries must be plain tensors",
    on_meta: r"up_scale\.0 is on the meta device",
    empty: "bias is an empty list",
    gaps: "not dense in memory",
    modules: r"no tensor 'up' \(it is a ModuleList\).*in a ParameterList, or in a list",
    one_twice: r"experts\.bias\.2 and .*experts\.bias\.6 share memory",
    overlapping: r"experts\.bias\.2 and .*experts\.bias\.6 share memory",
    also_stacked: r"experts\.weight share memory.*\(del module\.weight\)",
    also_registered: r"experts\.bias\.2 and .*experts\.bias_2 share memory",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_lists_whose_entries_cannot_take_each_others_place_are_refused(spoil: Any) -> None:
    model, experts = listed()
    spoil(experts)
    with pytest.raises(ValueError, match=REFUSED[spoil]):
        find_layers(model)


def test_entries_may_be_parts_of_one_memory() -> None:
    model, experts = listed()
    experts.bias = list(torch.zeros(EXPERTS, 16, 1).unbind(0))
    find_layers(model)
