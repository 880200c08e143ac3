"""`save_pretrained` for a wrapped model: the whole one, in logical order."""

from __future__ import annotations

import os
from typing import Any

from torch_eplb.state.full import full_state_dict
from torch_eplb.state.wrapped import Wrapped

__all__ = ["save_pretrained"]


def save_pretrained(balancer: Wrapped, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write the unwrapped model with its own ``save_pretrained``, on rank 0. Collective.

    Rank 0 needs host memory for the whole model; for one that does not fit, use
    `torch_eplb.ShardedState` with `torch.distributed.checkpoint`.

    Args:
        balancer: the wrapped model, whose class has ``save_pretrained(folder, state_dict=, ...)``
            as transformers' have.
        folder: where to write, on rank 0's machine.
        kwargs: passed on.

    Raises:
        AttributeError: the model's class has no ``save_pretrained``.
        RuntimeError: rank 0 could not write, on the other ranks.
        Exception: what writing raised, on rank 0.
        PeerLostError: a rank did not call it within ``timeout``.
    """
    model = balancer.module
    save: Any = getattr(type(model), "save_pretrained", None)
    if save is None:
        raise AttributeError(f"{type(model).__name__} has no save_pretrained")
    state = full_state_dict(balancer, rank0_only=True, cpu_offload=True)
    error: Exception | None = None
    if balancer.engine.comm.rank == 0:
        try:
            save(model, folder, state_dict=state, **kwargs)
        except Exception as found:  # the others wait for the outcome
            error = found
    failed = balancer.engine.gather(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed.get(0):
        raise RuntimeError(f"rank 0 could not write {os.fspath(folder)}: {failed[0]}")
