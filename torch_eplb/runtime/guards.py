"""Keeps others from taking this rank's experts for everybody's.

Under the same name every rank has other experts. Whoever broadcasts, averages, shards or saves a
model's parameters by name would overwrite or lose experts without an error; each of those that can
be met here is told to leave them alone, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.refusals import adapter_around
from torch_eplb.runtime.config import Config
from torch_eplb.values.errors import EPLBError

__all__ = ["Guards"]

_DDP = "_ddp_params_and_buffers_to_ignore"


class Guards:
    """What is installed on a wrapped model, and taken off when it is unwrapped.

    Args:
        model: the model that is wrapped.
        layers: its MoE layers, sharded.
        config: says whether gradients of experts would be right.

    Attributes:
        expert_names: of all tensors indexed by expert, as the model names them.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ExpertLayer], config: Config) -> None:
        self._model = model
        self._layers = layers
        self._next = 0
        self.expert_names = [
            f"{layer.name}.{name}".lstrip(".")
            for layer in layers
            for name, _ in layer.named_tensors()
        ]
        # DistributedDataParallel reads it from the module that it is given.
        setattr(model, _DDP, [*getattr(model, _DDP, ()), *self.expert_names])
        self._refusal = _refuse_saving(model)
        self.remember()
        self._handles: list[RemovableHandle] = []
        reason = _why_not_to_train(config)
        if reason is not None:
            for name, tensor in zip(self.expert_names, self._tensors(), strict=True):
                handle = _on_gradient(tensor, _refusing(name, reason))
                self._handles += [] if handle is None else [handle]

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self._layers for tensor in layer.tensors()]

    def remember(self) -> None:
        """What the experts' parameters are now is what they are meant to be."""
        self._parameters = [
            [tensor if isinstance(tensor, nn.Parameter) else None for tensor in layer.tensors()]
            for layer in self._layers
        ]
        self._names = [_parameter_names(layer) for layer in self._layers]
        self._devices = [layer.tensors()[0].device for layer in self._layers]

    def check_one(self) -> ExpertLayer:
        """Look at one layer's parameters, another one each time: all of them while steps go by.

        Returns:
            The layer.

        Raises:
            ValueError: they are not those that were wrapped any more.
        """
        index, layer = self._next, self._layers[self._next]
        self._next = (index + 1) % len(self._layers)
        tensors, known = layer.named_tensors(), self._parameters[index]
        if len(tensors) != len(known):
            raise ValueError(
                f"layer {layer.name}: its lists have {len(tensors)} tensors of experts, and had "
                f"{len(known)} when it was wrapped: each slot needs its entry. Put them back, or "
                "unwrap() first"
            )
        for (name, tensor), expected in zip(tensors, known, strict=True):
            if tensor.device != self._devices[index]:
                raise ValueError(
                    f"{layer.name}.{name} was moved to {tensor.device} after wrapping on "
                    f"{self._devices[index]}, where its routing tables and what receives experts "
                    "are; move it back, or unwrap() before moving and wrap again"
                )
            # FSDP puts a parameter of its own in place, a plain one while it is gathered.
            if expected is not None and tensor is not expected:
                raise ValueError(
                    f"{layer.name}.{name} was replaced after wrapping, by a "
                    f"{type(tensor).__name__} that torch_eplb does not know: of experts every rank "
                    "has others, and whatever shards or converts parameters must leave them alone. "
                    "FSDP2: fully_shard(..., ignored_params=set(balancer.expert_parameters())); "
                    "else unwrap() first"
                )
        adapter = adapter_around(self._model, layer.name)
        added = _parameter_names(layer) - self._names[index]
        if adapter is not None or added:
            what = adapter or f"the parameters {', '.join(sorted(added))}"
            raise ValueError(
                f"layer {layer.name}: {what} was added to the experts after wrapping, and would "
                "not move with them. Take it off again, or unwrap(), merge it (peft: "
                "model.merge_and_unload()) and wrap again; adapters on other modules may stay"
            )
        return layer

    def remove(self) -> None:
        """The model is unwrapped."""
        # Another balancer's may have come or gone since.
        own = set(self.expert_names)
        ignored = [name for name in getattr(self._model, _DDP, ()) if name not in own]
        if ignored:
            setattr(self._model, _DDP, ignored)
        elif hasattr(self._model, _DDP):
            delattr(self._model, _DDP)
        if self._refusal is not None:
            self._refusal.guards -= 1
            if not self._refusal.guards:
                self._model.__dict__.pop("save_pretrained", None)
        for handle in self._handles:
            handle.remove()


def _parameter_names(layer: ExpertLayer) -> set[str]:
    return {name for name, _ in layer.module.named_parameters()}


def _why_not_to_train(config: Config) -> str | None:
    """Why gradients of experts would be wrong."""
    if config.allow_training_with_moves:
        return None
    if config.num_redundant_experts:
        return "gradients of an expert's replicas are not summed, so that they would drift apart"
    if config.policy != "static":
        return (
            "optimizer state and gradients do not move with their experts (and norms of gradients "
            "are this rank's only)"
        )
    return None


class _Refusal:
    """Stands in for the ``save_pretrained`` of a model that one or more balancers guard."""

    def __init__(self) -> None:
        self.guards = 0

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise EPLBError(
            "save_pretrained of a wrapped model would write this rank's slots as if they were the "
            "model. Call balancer.save_pretrained(folder) on every rank, which writes all experts "
            "in logical order; or pass state_dict=balancer.state_dict(), gathered on every rank, "
            "to the model's class: type(model).save_pretrained(model, folder, state_dict=...). "
            "transformers' Trainer calls it on rank 0 only: override its save_model"
        )


def _refuse_saving(model: nn.Module) -> _Refusal | None:
    """What refuses from now on; None for a model that cannot save itself."""
    present = model.__dict__.get("save_pretrained")
    if not isinstance(present, _Refusal):
        if not callable(getattr(model, "save_pretrained", None)):
            return None
        model.__dict__["save_pretrained"] = present = _Refusal()
    present.guards += 1
    return present


def _refusing(name: str, reason: str) -> Callable[[torch.Tensor], NoReturn]:
    def refuse(gradient: torch.Tensor) -> NoReturn:
        raise EPLBError(
            f"a backward pass has reached {name}, and {reason}. Train with policy='static' and "
            "num_redundant_experts=0, or freeze the experts (requires_grad_(False)); "
            "allow_training_with_moves=True if you see to that yourself"
        )

    return refuse


def _on_gradient(
    tensor: torch.Tensor, hook: Callable[[torch.Tensor], NoReturn]
) -> RemovableHandle | None:
    """Call ``hook`` with the tensor's gradient, also where it is to require one only later."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.is_leaf:
        return None
    if tensor.is_inference():
        return None  # no backward pass reaches it
    wants = tensor.requires_grad
    tensor.requires_grad_(True)
    handle = tensor.register_hook(hook)
    tensor.requires_grad_(wants)
    return handle
