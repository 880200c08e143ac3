"""The operators of the simulated device: those of the CPU, run later, on the stream's own thread.

torch_npu registers some 1,500 ATen operators that would call the device's kernels. Their places are
taken here. An operator finds its results' shapes with meta tensors, makes them (torch_npu allocates
them, as on a device), and gives the stream a task: the same operator on CPU tensors that share the
device's memory. Nothing has run when it returns.

Operators whose results' shapes depend on values wait for the stream and run at once; so they count
as waits of the host, which they are on a device.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from npu_sim.runtime import library

__all__ = ["install"]

# Left to torch_npu, which carries them out on the runtime: memory, copies, reading a value. So are
# views, which touch no memory at all.
_OF_THE_RUNTIME = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "copy_",
    "_to_copy",
    "_copy_from_and_resize",
    "resize_",
    "resize_as_",
    "set_",
    "is_set_to",
    "as_strided_",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "_local_scalar_dense",
)

_Task = Callable[[], None]
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_long)
_tasks: dict[int, tuple[str, _Task]] = {}  # with the operator's name
_numbers = itertools.count()
_library: torch.library.Library | None = None


def install() -> None:
    """Register the operators; once per process."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name in torch._C._dispatch_get_all_op_names():
            operator = _find_operator(name)
            if operator is None:
                continue
            if has(name, "PrivateUse1") and not _is_of_the_runtime(operator):
                _register(operator, functools.partial(_run_later, operator), "PrivateUse1")
            if has(name, "AutogradPrivateUse1"):
                # torch_npu differentiates some operators by operators of its own, which have no
                # kernels here. Every other device's derivatives are made of those that have.
                derive = functools.partial(operator._op_dk, torch._C.DispatchKey.Autograd)
                if has(name, "CompositeImplicitAutograd"):
                    derive = operator.decompose
                _register(operator, derive, "AutogradPrivateUse1")


def _find_operator(name: str) -> Any:
    """The operator of a registered name; None for torch_npu's own, which torch does not know."""
    if not name.startswith("aten::"):
        return None
    base, _, overload = name.removeprefix("aten::").partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return getattr(packet, overload or "default", None)


def _is_of_the_runtime(operator: Any) -> bool:
    schema = operator._schema
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return is_view or schema.name.removeprefix("aten::") in _OF_THE_RUNTIME


def _register(operator: Any, function: Callable[..., Any], key: str) -> None:
    assert _library is not None
    name = operator._schema.name.removeprefix("aten::")
    overload = operator._overloadname
    full = name if overload == "default" else f"{name}.{overload}"
    _library.impl(full, function, key, allow_override=True)


# ---- one operator -------------------------------------------------------------------------------


def _run_later(operator: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    try:
        shapes, made_from = _infer(operator, leaves, spec)
    except Exception:
        # Its results' shapes depend on values; or it is an error, which will be raised here again.
        return _run_now(operator, leaves, spec)
    device = _device(leaves)
    results = pytree.tree_map(lambda shape: _like(shape, made_from, device), shapes)
    fresh = [
        (number, _host_view(result))
        for number, (shape, result) in enumerate(
            zip(pytree.tree_leaves(shapes), pytree.tree_leaves(results), strict=True)
        )
        if isinstance(shape, torch.Tensor) and id(shape) not in made_from
    ]
    here = [_on_host(leaf) for leaf in leaves]

    def task() -> None:
        # Tensors of the device may be born in inference mode, and are written in it or not at all.
        with torch.inference_mode():
            computed = pytree.tree_leaves(_call(operator, here, spec))
            for number, target in fresh:
                target.copy_(computed[number])

    _launch(str(operator), task)
    return results


def _run_now(operator: Any, leaves: list[Any], spec: Any) -> Any:
    """Wait for the stream and run."""
    torch.npu.current_stream().synchronize()
    device = _device(leaves)
    here = [_on_host(leaf) for leaf in leaves]
    given = {id(cpu): leaf for cpu, leaf in zip(here, leaves, strict=True)}

    def back(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:
            return given[id(value)]
        result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        _host_view(result).copy_(value)
        return result

    return pytree.tree_map(back, _call(operator, here, spec))


def _infer(operator: Any, leaves: list[Any], spec: Any) -> tuple[Any, dict[int, torch.Tensor]]:
    """The results as meta tensors, and which of those are arguments (by id)."""
    arguments: dict[int, torch.Tensor] = {}

    def meta(leaf: Any) -> Any:
        if _is_device(leaf):
            return torch.device("meta")
        if not _is_on_device(leaf):
            return leaf
        shape = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        arguments[id(shape)] = leaf
        return shape

    shapes = _call(operator, keep := [meta(leaf) for leaf in leaves], spec)
    for shape in keep:
        if id(shape) in arguments and shape.shape != arguments[id(shape)].shape:
            raise NotImplementedError(f"{operator} resizes an argument")
    return shapes, arguments


def _call(operator: Any, leaves: list[Any], spec: Any) -> Any:
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return operator(*args, **kwargs)


def _like(shape: Any, made_from: dict[int, torch.Tensor], device: torch.device) -> Any:
    if not isinstance(shape, torch.Tensor):
        return shape
    if id(shape) in made_from:
        return made_from[id(shape)]
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)


# ---- tensors ------------------------------------------------------------------------------------


def _is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "npu"


def _device(leaves: list[Any]) -> torch.device:
    for leaf in leaves:
        if _is_on_device(leaf):
            return leaf.device
        if _is_device(leaf) and leaf.index is not None:
            return leaf
    return torch.device("npu", torch.npu.current_device())


def _on_host(leaf: Any) -> Any:
    """What stands for an argument when the operator runs on the CPU."""
    if _is_device(leaf):
        return torch.device("cpu")
    if isinstance(leaf, torch.Generator):
        return None  # the device's own
    if not isinstance(leaf, torch.Tensor):
        return leaf
    # A scalar of the host is passed by value.
    return _host_view(leaf) if _is_on_device(leaf) else leaf.clone()


def _host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor in the same memory."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size() * tensor.element_size()
    if size == 0 or tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    address = library().npu_sim_reach(ctypes.c_void_p(storage.data_ptr()))
    memory = (ctypes.c_uint8 * size).from_address(address)
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


# ---- tasks --------------------------------------------------------------------------------------


def _launch(name: str, task: _Task) -> None:
    number = next(_numbers)
    _tasks[number] = name, task
    stream = torch.npu.current_stream()
    # Asking for the runtime's stream lets what torch_npu has queued reach it first.
    library().npu_sim_launch(ctypes.c_void_p(stream.npu_stream), _run, _release, number)


@_Callback
def _run(number: int) -> None:
    """Runs on the stream's thread."""
    name, task = _tasks[number]
    try:
        task()
    except Exception as error:
        traceback.print_exc()
        library().npu_sim_fail(f"the kernel of {name} failed: {error}".encode())


@_Callback
def _release(number: int) -> None:
    del _tasks[number]


library().npu_sim_reach.restype = ctypes.c_void_p
