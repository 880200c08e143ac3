"""What an expert's weights cost beside its tokens, in tokens: W of `torch_eplb.routing.costs`."""

from __future__ import annotations

import logging
import math
import re
import time

import torch

from torch_eplb.comm.agreement import gather_json
from torch_eplb.comm.communicator import Communicator
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.runtime.config import Config

__all__ = ["agree_on_weight_tokens"]

logger = logging.getLogger("torch_eplb")

# Peak rate (dense BF16) and memory bandwidth, as their makers publish them. A token's multiply-adds
# are two operations a weight, and a weight has the more bytes the slower its operations are, so
# that the quotient is W for every dtype.
_DEVICES = (
    (r"\bG?B200\b", 2250e12, 8.0e12),
    (r"\bH200\b", 989e12, 4.8e12),
    (r"\bG?H100\b", 989e12, 3.35e12),
    (r"\bH20\b", 148e12, 4.0e12),
    (r"\bA100\b", 312e12, 2.04e12),
    (r"\bMI300X\b", 1307e12, 5.3e12),
    (r"Ascend910", 376e12, 1.6e12),  # a die of a 910C: arXiv:2506.12708
)

_MANY = 256  # tokens that are timed together
_REPEATS = 3
_MOST = 1 << 20  # beyond it nothing but the number of active experts ever counts


def agree_on_weight_tokens(config: Config, layers: list[ExpertLayer], comm: Communicator) -> int:
    """W, the same on all ranks: the least that any of them finds. Collective.

    0 where only tokens count: ``cost=None``, a device that "auto" does not know, or a replica
    choice that does not look at the batch.
    """
    if config.cost is None or config.replica_choice not in ("batch", "local"):
        return 0
    if isinstance(config.cost, tuple):
        weight, token = config.cost
        return min(math.ceil(weight / token), _MOST)
    if config.cost == "auto" and comm.device.type == "cpu":
        return 0
    found = _known(comm.device)
    if config.cost == "measured":
        try:
            found = _measure(layers[0], comm.device)
        except (RuntimeError, NotImplementedError) as error:  # no product of such tensors
            logger.warning("cost='measured': %s; cost='auto' is used", error)
    return min(gather_json(comm, found))


def _known(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    name = torch.get_device_module(device).get_device_name(device)
    for pattern, flops, bandwidth in _DEVICES:
        if re.search(pattern, name):
            return round(flops / bandwidth)
    return 0


def _measure(layer: ExpertLayer, device: torch.device) -> int:
    """How many tokens take as long as the weights, by products with the layer's own matrices."""
    matrices = [
        [part.slot(slot).detach() for slot in range(len(part))]
        for part in layer.parts()
        if len(part.inner_shape) == 2
    ]
    if not matrices:
        raise RuntimeError(f"layer {layer.name} has no tensors [experts, in, out]")

    def seconds(tokens: int) -> float:
        """Of one expert with so many tokens: the best of some times through all experts."""
        inputs = [
            torch.ones((tokens, m[0].shape[1]), dtype=m[0].dtype, device=device) for m in matrices
        ]
        return min(_time(matrices, inputs, device) for _ in range(_REPEATS)) / len(matrices[0])

    weight = seconds(1)
    token = (seconds(_MANY) - weight) / (_MANY - 1)
    return max(1, min(round(weight / token) if token > 0 else _MOST, _MOST))


def _time(
    matrices: list[list[torch.Tensor]], inputs: list[torch.Tensor], device: torch.device
) -> float:
    _wait_for(device)
    start = time.perf_counter()
    # One expert's matrices after the other's: so their weights come from memory.
    for expert in zip(*matrices, strict=True):
        for matrix, rows in zip(expert, inputs, strict=True):
            torch.mm(rows, matrix.t())
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
