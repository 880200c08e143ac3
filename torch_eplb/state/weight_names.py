"""How a checkpoint's tensors are called, where it does not call them as the model does. Pure.

A model of transformers 5 keeps a layer's experts in a few tensors ``[experts, ...]``; its
checkpoints hold every expert's projections by themselves:

    model                                    checkpoint
    model.layers.0.mlp.experts.gate_up_proj  model.layers.0.mlp.experts.3.gate_proj.weight
                                             model.layers.0.mlp.experts.3.up_proj.weight
    model.layers.0.mlp.experts.down_proj     model.layers.0.mlp.experts.3.down_proj.weight

or, as Mixtral's, ``model.layers.0.block_sparse_moe.experts.3.w1.weight``, ``w3``, ``w2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

__all__ = ["NameRule", "usual_names"]

NameRule = Callable[[str, "int | None"], "Sequence[str] | None"]
"""From a model's key, and the logical expert if the key is a tensor indexed by expert, to the names
of the checkpoint's tensors that fill it, or fill this expert's part of it, one after the other on
dim 0. None leaves the key to the usual names."""

# What an expert's tensor is called in the model, and its pieces in checkpoints, on dim 0 in order.
_PIECES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("w2",),)}
_MOE_BLOCKS = ("block_sparse_moe",)


def usual_names(key: str, expert: int | None) -> Iterator[Sequence[str]]:
    """Names under which checkpoints hold ``key``, other than itself; see `NameRule`.

    >>> list(usual_names("layers.0.mlp.experts.gate_up_proj", 3))[1]
    ['layers.0.mlp.experts.3.gate_proj.weight', 'layers.0.mlp.experts.3.up_proj.weight']
    >>> list(usual_names("layers.0.mlp.gate.weight", None))
    [['layers.0.block_sparse_moe.gate.weight']]
    """
    keys = [key, *(key.replace(".mlp.", f".{block}.") for block in _MOE_BLOCKS if ".mlp." in key)]
    if expert is None:
        yield from ([name] for name in keys[1:])
        return
    for name in keys:
        head, experts, leaf = name.rpartition("experts.")
        if not experts or "." in leaf:
            continue
        stem = leaf.removesuffix("_bias")
        kind = "weight" if stem == leaf else "bias"
        for pieces in ((stem,), *_PIECES.get(stem, ())):
            yield [f"{head}experts.{expert}.{piece}.{kind}" for piece in pieces]
    yield from ([name] for name in keys[1:])
