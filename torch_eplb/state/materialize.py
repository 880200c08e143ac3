"""From the meta device to memory: a model's tensors are made, and what no checkpoint has computed.

Knows modules and their conventions, nothing of experts or ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["materialize"]


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model's tensors on the meta device their memory, uninitialised, on ``device``.

    Tensors that are shared stay shared, and tensors that have memory are left alone. Buffers that
    are not part of the state dict (rotary frequencies, masks) come from no checkpoint: they are
    computed by the module's own means, which are ``_init_weights(module)`` of a module that
    contains it (transformers) or ``reset_parameters()`` of its own. Both may write the module's
    parameters, too, so load these afterwards.

    Raises:
        RuntimeError: a buffer cannot be computed; it and the remedy are named, and the model is on
            the meta device as before.
    """
    made: dict[int, torch.Tensor] = {}
    changed: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for module in model.modules():
                stores: list[dict[str, Any]] = [module._parameters, module._buffers]
                for store in stores:
                    for name, tensor in store.items():
                        if tensor is None or not tensor.is_meta:
                            continue
                        if id(tensor) not in made:
                            made[id(tensor)] = _empty(tensor, device)
                        changed.append((store, name, tensor))
                        store[name] = made[id(tensor)]
            for name, module in model.named_modules():
                _compute_buffers(model, name, module, {id(tensor) for tensor in made.values()})
    except BaseException:
        for store, name, tensor in changed:
            store[name] = tensor
        raise


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    empty = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    empty.__dict__.update(tensor.__dict__)
    return empty


def _compute_buffers(model: nn.Module, name: str, module: nn.Module, made: set[int]) -> None:
    """Fill the module's buffers that are new and in no state dict."""
    attributes = [key for key, value in vars(module).items() if _on_meta(value)]
    if attributes:
        raise RuntimeError(
            f"{name}.{attributes[0]} is a tensor on the meta device that is neither parameter nor "
            f"buffer: {_remedy(name, module, attributes[0])}"
        )
    present = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
    missing = {
        key: tensor._version
        for key, tensor in present.items()
        if tensor is not None and id(tensor) in made
    }
    if not missing:
        return
    # The random numbers that initialising may draw are nobody's business.
    with torch.random.fork_rng(devices=[]):
        for compute in _ways_to_compute(model, name, module):
            compute()
            for key, version in list(missing.items()):
                now = module._buffers[key]
                assert now is not None
                if not now.is_meta and (now is not present[key] or now._version != version):
                    module._buffers[key] = now.to(present[key].device)  # type: ignore[union-attr]
                    del missing[key]
            if not missing:
                return
    buffer = next(iter(missing))
    raise RuntimeError(
        f"buffer {name}.{buffer} is not part of checkpoints (persistent=False), and "
        f"{type(module).__name__} has no means to compute it again (_init_weights of a "
        f"transformers model, or reset_parameters): {_remedy(name, module, buffer)}"
    )


def _ways_to_compute(model: nn.Module, name: str, module: nn.Module) -> Iterator[Any]:
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        owner = model.get_submodule(".".join(parts[:length]))
        init = getattr(owner, "_init_weights", None)
        if callable(init):
            yield lambda init=init: init(module)
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        yield reset


def _on_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _remedy(name: str, module: nn.Module, attribute: str) -> str:
    return (
        f"set it before loading, balancer.module.get_submodule({name!r}).{attribute} = ..., or "
        "build the model with parameters on the meta device only"
    )
