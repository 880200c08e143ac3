"""Forward and backward read nothing back from a device but what is named here.

The hooks run on fake tensors: they have a device, a dtype and a shape, and no values. Whatever
would make the host wait for values is noted with its place, and answered, and so are copies from
memory that is not pinned. Operators whose results' shapes depend on values raise, and so do
operands on different devices.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.few_kernels import EXPERTS, HIDDEN, FewKernelExperts, SentinelExperts
from support.models import Elsewhere
from support.ranks import run_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import torch_eplb
from torch_eplb.layers import all_to_all
from torch_eplb.testing import fake_process_group

_PACKAGE = Path(torch_eplb.__file__).parent
TOKENS, TOP_K, LAYERS = 6, 2, 2

SIZES = "layers/all_to_all.py:_plan"
COUNTS = "layers/all_to_all.py:_choose_together"
LOCAL = "routing/rows.py:arrivals"
LARGEST = "layers/all_gather.py:_ask"

# dispatch, replica choice, experts, further options; what a layer reads back, in order. "in_vain"
# is no option, but how many bytes may travel so that sizes need not be read.
READS: list[tuple[str, str, str, dict[str, Any], list[str]]] = [
    ("all_to_all", "batch", "plain", {}, [COUNTS]),
    ("all_to_all", "batch", "plain", {"cost": (300.0, 1.0)}, [COUNTS]),
    ("all_to_all", "batch", "plain", {"in_vain": -1}, [COUNTS, SIZES]),
    ("all_to_all", "local", "plain", {}, [SIZES]),
    ("all_to_all", "local", "plain", {"cost": (300.0, 1.0)}, [SIZES]),
    ("all_to_all", "table", "plain", {}, [SIZES]),
    ("all_to_all", "even", "plain", {}, [SIZES]),
    ("all_gather", "batch", "sentinel", {}, [LARGEST]),
    ("all_gather", "batch", "sentinel", {"max_tokens_per_rank": 8}, []),
    ("all_gather", "table", "sentinel", {"max_tokens_per_rank": 8}, []),
    ("all_gather", "even", "sentinel", {"max_tokens_per_rank": 8}, []),
    ("all_gather", "table", "plain", {"max_tokens_per_rank": 8}, [LOCAL]),
    ("all_reduce", "batch", "sentinel", {}, []),
    ("all_reduce", "batch", "sentinel", {"cost": (300.0, 1.0)}, []),
    ("all_reduce", "table", "sentinel", {}, []),
    ("all_reduce", "even", "sentinel", {}, []),
    ("all_reduce", "table", "plain", {}, [LOCAL]),
    ("external", "local", "external", {}, []),
    ("external", "local", "external", {"cost": (300.0, 1.0)}, []),
    ("external", "table", "external", {}, []),
    ("external", "even", "external", {}, []),
    ("external", "table", "counting", {}, []),
    ("external", "local", "counting", {}, []),
]


class Counting(Elsewhere):
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.arrived = top_k_index.new_zeros(len(self.up), dtype=torch.int32)
        return hidden_states


KINDS: dict[str, type[nn.Module]] = {
    "plain": FewKernelExperts,
    "sentinel": SentinelExperts,
    "external": Elsewhere,
    "counting": Counting,
}


class Reads(TorchDispatchMode):
    """Notes what makes the host wait, and answers.

    Attributes:
        places: where it was.
        pinned: tensors of the host that a copy may read later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type != "cpu":
                self.note()
            return TOKENS
        if func is torch.ops.aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            is_pinned = any(args[0] is tensor for tensor in self.pinned)
            if target.type != args[0].device.type and not is_pinned:
                self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            if Path(frame.filename).is_relative_to(_PACKAGE):
                place = f"{Path(frame.filename).relative_to(_PACKAGE)}:{frame.name}"
                # One wait for all values of a list.
                if self.places[-1:] != [place]:
                    self.places.append(place)
                return
        raise AssertionError("read back by no code of the package")


class OnHost(TorchFunctionMode):
    """Lets numpy compute on the host, with ones for what was read from the device.

    Args:
        mode: of the fake tensors.
        slots_EM: what the host knows of a layer.
        reads: is told what is pinned.
    """

    def __init__(self, mode: FakeTensorMode, slots_EM: np.ndarray, reads: Reads) -> None:
        super().__init__()
        self.reads = reads
        self.mode = mode
        self.slots_EM = slots_EM

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.numpy:
            assert args[0].device.type == "cpu"
            is_known = args[0].shape == self.slots_EM.shape
            return self.slots_EM if is_known else np.ones(args[0].shape, dtype=np.int64)
        if func is torch.Tensor.pin_memory:
            self.reads.pinned.append(args[0])
            return args[0]
        if func is torch.tensor and kwargs and "device" in kwargs:
            return func(*args).to(kwargs["device"])
        result = func(*args, **(kwargs or {}))
        return self.mode.from_tensor(result) if func is torch.from_numpy else result


def make_known(device: str) -> None:
    """Let torch know a type of device that is not there."""
    backend_registration._setup_privateuseone_for_python_backend(device)


def forwards(rank: int, world_size: int, device: str, dispatch: str) -> list[list[str]]:
    make_known(device)
    torch_eplb.register_layer(SentinelExperts, skips_sentinel=True)
    torch_eplb.register_layer(Elsewhere)
    torch_eplb.register_layer(Counting, token_counts="arrived")
    found = []
    for way in ways(dispatch):
        *names, options, _ = way
        with fake_process_group(world_size=2, rank=1) as group:
            backend = group._get_backend(torch.device("cpu"))
            kind = dist.ProcessGroup.BackendType.CUSTOM
            group._register_backend(torch.device(device), kind, backend)
            found.append(reads(device, *names, options))
    return found


def reads(device: str, dispatch: Any, choice: Any, kind: str, options: Any) -> list[str]:
    """What a layer's forward and backward read back on a fake device."""
    options = dict(options)
    in_vain = options.pop("in_vain", all_to_all._IN_VAIN_ON_DEVICES)
    model = nn.ModuleList(KINDS[kind]() for _ in range(LAYERS))
    balancer = torch_eplb.wrap(
        model,
        dispatch=dispatch,
        replica_choice=choice,
        num_redundant_experts=4,
        allow_training_with_moves=True,
        **options,
    )
    balancer.engine.comm.device = torch.device(device, 0)
    context: Any = balancer.engine._dispatches[0].context
    slots_EM = context.tables.slots_LEM[0].numpy().copy()
    with FakeTensorMode() as mode:

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            return mode.from_tensor(tensor).detach().to(balancer.engine.comm.device)

        for hooks in balancer.engine._dispatches:
            vars(hooks).pop("_many", None)  # what is another on the CPU
        for owner in (context.tables, context.counters):
            for name, value in list(vars(owner).items()):
                if isinstance(value, torch.Tensor):
                    on_host = name.startswith("host")
                    setattr(owner, name, mode.from_tensor(value) if on_host else fake(value))
        context.counters._experts = [row[:EXPERTS] for row in context.counters.values]
        context.counters._ranks = [row[EXPERTS:] for row in context.counters.values]
        for experts in model:
            for name, parameter in list(experts.named_parameters()):
                setattr(experts, name, nn.Parameter(fake(parameter)))
            for name, buffer in list(experts.named_buffers()):
                setattr(experts, name, fake(buffer))
        x = torch.zeros(TOKENS, HIDDEN, device=device, requires_grad=True)
        ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int64, device=device)
        weights = torch.zeros(TOKENS, TOP_K, device=device, requires_grad=True)
        limit = patch.object(all_to_all, "_IN_VAIN_ON_DEVICES", in_vain)
        with Reads() as found, OnHost(mode, slots_EM, found), limit:
            places = []
            for experts in model:
                y = experts(x, ids, weights)
                assert (y.shape, y.device) == (x.shape, x.device)
                y.sum().backward()
                places.append(found.places.copy())
                found.places.clear()
    balancer.engine.release()
    assert places[1:] == places[:-1]  # all layers alike
    return places[0]


def ways(dispatch: str) -> list[tuple[str, str, str, dict[str, Any], list[str]]]:
    return [way for way in READS if way[0] == dispatch]


# Integers are computed with in 32 bits on NPUs, and in 64 on any other device.
@pytest.mark.parametrize("device", ["npu", "gpu"])
@pytest.mark.parametrize("dispatch", sorted({way[0] for way in READS}))
def test_a_layer_reads_back_what_is_documented_and_nothing_else(device: str, dispatch: str) -> None:
    (found,) = run_ranks(forwards, 1, device, dispatch, backend="", timeout=240.0)
    assert {str(way[:4]): places for way, places in zip(ways(dispatch), found, strict=True)} == {
        str(way[:4]): way[4] for way in ways(dispatch)
    }
