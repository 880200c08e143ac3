"""What an MoE layer is to us: an experts module, its forward's arguments, its expert tensors.

An experts module is called with the router's choice, ``(hidden_states [T, H], expert ids [T, K],
expert weights [T, K])``, and holds tensors whose dim 0 is the expert. That is the experts class of
some 65 architectures in transformers 5, recognised by its signature, without importing it. A few
of its classes have forms of their own (`torch_eplb.layers.known`). Other classes are told with
`register_layer`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from torch_eplb.layers.known import Form, form_of

__all__ = [
    "BoundArguments",
    "LayerSpec",
    "TokenCounts",
    "find_spec",
    "register_layer",
    "skips_sentinel",
]

TokenCounts: TypeAlias = str | Callable[[nn.Module, Any], torch.Tensor]
"""Where a layer tells how many tokens each of its slots got; see `register_layer`."""


@dataclass(frozen=True)
class LayerSpec:
    """How to read and to call one class of experts modules.

    Attributes:
        hidden_states, expert_ids, expert_weights: names of forward's arguments; ``expert_weights``
            is None where forward takes none (``dispatch="external"`` only).
        num_experts: name of the attribute that holds the number of logical experts.
        tensors: names of the tensors indexed by expert on dim 0, of lists with a tensor per expert,
            and, with ``{}``, of tensors in modules of their own; or None for every parameter and
            buffer of the module whose dim 0 has ``num_experts`` entries.
        skips_sentinel: forward ignores choices whose id equals the number of local experts, so that
            ``dispatch="all_reduce"`` can mark foreign choices without changing any shape. None:
            transformers' experts, which do in all implementations but the eager loop.
        fused: forward is that of fused gated experts, as `register_layer` says.
        token_counts: what tells how many tokens each local slot got in a forward: the name of an
            attribute, or a function of the module and its output. None: ids are counted.
        token_mask: name of forward's argument that tells tokens from padding, or None.
        num_zero_experts: name of the attribute that holds the number of zero-compute experts, or
            None where there are none.
        needs_two_choices: forward cannot take rows of a single choice (transformers' LongCat-Flash
            drops the dimension), so that it gets a second one, of weight 0, that computes nothing.
        form: what is different about calls and tensors of this class, or None. While its experts
            are sharded, ``hidden_states`` and so on are names that its hooks use.
    """

    hidden_states: str
    expert_ids: str
    expert_weights: str | None
    num_experts: str = "num_experts"
    tensors: tuple[str, ...] | None = None
    skips_sentinel: bool | None = False
    token_mask: str | None = None
    num_zero_experts: str | None = None
    needs_two_choices: bool = False
    fused: bool = False
    token_counts: TokenCounts | None = None
    form: Form | None = None


# transformers' experts classes, by the names of forward's first three arguments.
_KNOWN = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)
# Only classes are kept, and weakly: a registry must not keep models alive.
_registry: weakref.WeakKeyDictionary[type[nn.Module], LayerSpec] = weakref.WeakKeyDictionary()


def register_layer(
    cls: type[nn.Module],
    *,
    hidden_states: str = "hidden_states",
    expert_ids: str = "top_k_index",
    expert_weights: str | None = "top_k_weights",
    num_experts: str = "num_experts",
    tensors: Sequence[str] | None = None,
    skips_sentinel: bool = False,
    token_mask: str | None = None,
    num_zero_experts: str | None = None,
    fused: bool = False,
    token_counts: TokenCounts | None = None,
) -> None:
    """Tell `torch_eplb.wrap` how to balance experts modules of class ``cls`` (and subclasses).

    Args:
        cls: the module that holds the experts and whose forward gets the router's choice.
        hidden_states: forward's argument of shape ``[..., H]``, one row per token.
        expert_ids: forward's argument of shape ``[..., K]``, integer logical expert ids.
        expert_weights: forward's argument of shape ``[..., K]``, or None if forward has none. The
            output must be linear in it: a token's output is the sum over its choices of weight
            times expert output.
        num_experts: attribute of the module that holds the number of logical experts E. It is set
            to the number of local slots while the model is wrapped.
        tensors: names (dotted, relative to the module) of the parameters and buffers that are
            indexed by expert on dim 0, or of ParameterLists and attributes that are a list or tuple
            with a tensor per expert; or, where experts are modules, of all tensors in these, with
            ``{}`` for the number of the expert: "experts.{}.up.weight". None takes all parameters
            and buffers whose dim 0 has E entries.
        skips_sentinel: forward ignores choices with id == ``module.num_experts``.
        token_mask: forward's argument of shape ``[...]``, bool, one entry per token: rows where it
            is false are padding, which is computed and not counted as load. A caller may leave it
            out or pass None. For masks that do not reach the layer there is ``balancer.tokens``.
        num_zero_experts: attribute of the module that holds the number of zero-compute experts Z,
            whose ids are E..E+Z-1 and whose output is their input. They have no slot, are not
            counted, and add weight times input on the rank that has the token; under external
            dispatch their ids follow the last physical one.
        fused: an expert is ``down_proj(act_fn(gate) * up)`` with ``gate, up`` the halves of
            ``gate_up_proj``; these are the tensors' names, ``[experts, out, in]`` (with
            ``is_transposed = True`` ``[experts, in, out]``), ``act_fn`` is SiLU unless the module
            has one, and a method ``_apply_gate(gate_up)`` goes before it. With ``has_bias = True``
            there are ``gate_up_proj_bias`` and ``down_proj_bias``. Such experts can be computed
            with grouped matrix products.
        token_counts: for layers that dispatch by themselves (``dispatch="external"``) and know how
            many tokens arrived at each slot of this rank (MC2's ``expert_token_nums``): then these
            are the load, and nothing else counts the layer. The name of an attribute of the module
            that each forward sets anew (or, if it is a registered buffer, writes in place), or a
            function ``(module, output)``; it gives an integer tensor ``[S]`` on the module's
            device, one entry per local slot, not cumulative. It is read after each forward, on the
            device. No mask can be applied to it.

    Raises:
        TypeError: ``cls`` is no nn.Module class.
        ValueError: its forward has no argument of a given name, ``skips_sentinel`` and
            ``num_zero_experts`` both want the id E, or ``token_counts`` goes with a ``token_mask``
            or is one of ``tensors``.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class derived from torch.nn.Module, got {cls!r}")
    known = list(inspect.signature(cls.forward).parameters)[1:]
    for role, name in (
        ("hidden_states", hidden_states),
        ("expert_ids", expert_ids),
        ("expert_weights", expert_weights),
        ("token_mask", token_mask),
    ):
        if name is not None and name not in known:
            raise ValueError(
                f"{role}={name!r}: {cls.__name__}.forward has no such argument, it has "
                f"{', '.join(known)}"
            )
    if skips_sentinel and num_zero_experts is not None:
        raise ValueError(
            f"skips_sentinel=True and num_zero_experts={num_zero_experts!r}: the id past the last "
            "expert is either a choice to ignore or a zero-compute expert; leave skips_sentinel out"
        )
    _check_token_counts(token_counts, token_mask, tensors)
    _registry[cls] = LayerSpec(
        hidden_states,
        expert_ids,
        expert_weights,
        num_experts,
        tuple(tensors) if tensors is not None else None,
        skips_sentinel,
        token_mask,
        num_zero_experts,
        fused=fused,
        token_counts=token_counts,
    )


def _check_token_counts(
    token_counts: TokenCounts | None, token_mask: str | None, tensors: Sequence[str] | None
) -> None:
    if token_counts is None:
        return
    if not (isinstance(token_counts, str) or callable(token_counts)):
        raise TypeError(
            "token_counts must be the name of an attribute or a function of the module and its "
            f"output, got {type(token_counts).__name__}"
        )
    if inspect.ismethod(token_counts):
        raise TypeError(
            f"token_counts={token_counts.__qualname__} is bound to an object, which would be asked "
            "for all layers of the class: pass a function (module, output)"
        )
    if token_mask is not None:
        raise ValueError(
            f"token_mask={token_mask!r} and token_counts={token_counts!r}: which of the tokens "
            "that arrived are padding is not known. Leave one of them out; a row of padding with "
            "the expert id -1 goes to no slot"
        )
    if tensors is not None and token_counts in tensors:
        raise ValueError(
            f"token_counts={token_counts!r} is also one of tensors: what a forward counts does not "
            "move with an expert; take it out of tensors"
        )


def find_spec(module: nn.Module) -> LayerSpec | None:
    """The spec of an experts module, or None if it is none."""
    for cls in type(module).__mro__:
        if cls in _registry:
            return _registry[cls]
    form = form_of(module)
    if form is not None:
        return LayerSpec(*_KNOWN[0], tensors=form.tensors, form=form)
    names = tuple(inspect.signature(type(module).forward).parameters)[1:4]
    if names not in _KNOWN:
        return None
    if isinstance(getattr(module, "num_experts", None), int):
        # Those that take part in transformers' own expert parallelism skip sentinels, at times.
        return LayerSpec(
            *names, skips_sentinel=None if hasattr(module, "_is_expert_parallel") else False
        )
    zero = "zero_expert_num"  # LongCat-Flash
    if all(isinstance(getattr(module, name, None), int) for name in ("num_routed_experts", zero)):
        return LayerSpec(
            *names,
            num_experts="num_routed_experts",
            num_zero_experts=zero,
            needs_two_choices=True,
        )
    return None


def skips_sentinel(spec: LayerSpec, module: nn.Module) -> bool:
    """Whether the module's forward ignores choices of the id past its last expert, as of now.

    The implementation of transformers' experts may be changed at any time. Their eager loops are
    not made alike, and wait for the device anyhow, so that none of them is given a sentinel.
    """
    if spec.skips_sentinel is not None:
        return spec.skips_sentinel
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return implementation not in ("eager", None)


class BoundArguments:
    """Reads and replaces forward's arguments, wherever the caller put them."""

    def __init__(self, spec: LayerSpec, forward: Callable[..., Any]) -> None:
        self.spec = spec
        names = list(inspect.signature(forward).parameters)[1:]  # without self, whatever its name
        self._positions = {name: i for i, name in enumerate(names)}

    def get(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The argument called ``name``.

        Raises:
            TypeError: the caller passed none.
        """
        value = self.find(name, args, kwargs)
        if value is None:
            raise TypeError(f"an experts module was called without its argument {name!r}")
        return value

    def find(
        self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """The argument called ``name``, or None where the caller passed none."""
        if name is None:
            return None
        if name in kwargs:
            return kwargs[name]
        position = self._positions[name]
        return args[position] if position < len(args) else None

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[str, torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``args`` and ``kwargs`` with the named arguments exchanged."""
        new_args = list(args)
        new_kwargs = dict(kwargs)
        for name, value in values.items():
            position = self._positions[name]
            if name not in kwargs and position < len(new_args):
                new_args[position] = value
            else:
                new_kwargs[name] = value
        return tuple(new_args), new_kwargs
