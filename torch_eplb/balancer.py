"""`wrap` and `ExpertLoadBalancer`: what a user sees of a balanced model.

No machinery: that is `runtime.engine`, and what is done with a model's state is in `state`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from torch_eplb.exporters.text import report
from torch_eplb.layers.dispatch import BoundToRanks
from torch_eplb.runtime.config import Config
from torch_eplb.runtime.engine import Engine
from torch_eplb.runtime.options import Options
from torch_eplb.runtime.prepare import prepare
from torch_eplb.state import full, saving
from torch_eplb.values.events import CommittedRound
from torch_eplb.values.metrics import Stats
from torch_eplb.values.placement import Placement

__all__ = ["ExpertLoadBalancer", "wrap"]


def wrap(
    model: nn.Module,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    config: Config | None = None,
    **options: Unpack[Options],
) -> ExpertLoadBalancer:
    """Shard a model's experts over the ranks of a group and keep their load balanced.

    From then on the model's forward counts where tokens go; every ``collect_interval`` steps a
    background process plans a better placement, and experts move between ranks in place while the
    model keeps running. Outputs stay those of the unwrapped model.

    How a rebalance goes (all ranks in lockstep, counted in forwards):

    1. for ``collect_interval`` steps the load of every logical expert is counted on the device;
    2. the ranks' counts are summed on the CPU, and rank 0's planner process makes a plan;
    3. ``plan_interval`` steps after 1 at the earliest, tokens are split anew among the replicas
       that are already there;
    4. experts move, round after round, each round within ``staging_bytes`` of receive memory per
       rank; a round is committed, weights and routing together, in the same step on all ranks,
       when every rank has received everything.

    Collective: every rank of the group calls it with the same model and arguments.

    Args:
        model: any nn.Module with MoE layers, on its device, with full experts and the same weights
            on every rank (``dispatch="external"``: also with experts already sharded, one per
            slot, in the initial placement). Or on the meta device: then
            `torch_eplb.load_pretrained` comes before the first forward.
        process_group: the expert-parallel ranks, as a group or a one-dimensional
            `torch.distributed.DeviceMesh`; None is the default group.
        config: settings to start from; None is ``Config()``.
        **options: the fields of `torch_eplb.Config`; they go before those of ``config``.

    Returns:
        A module with ``model`` as ``.module``, to be called like the model.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError, TypeError: an argument is wrong, ranks differ in one, or the model has no MoE
            layer that can be balanced. Raised on every rank.
        PeerLostError: a rank did not come within ``timeout``.

    Example::

        dist.init_process_group("gloo")
        model = torch_eplb.wrap(model, num_redundant_experts=16)
        model(input_ids=batch)
    """
    return ExpertLoadBalancer(Engine(prepare(model, process_group, config, options)))


class ExpertLoadBalancer(BoundToRanks, nn.Module):
    """A model whose experts are sharded and balanced; made by `wrap`.

    Its forward is the model's. Unknown attributes are looked up on the model. The hooks sit on the
    model itself, so ``balancer.module.generate(...)`` balances as well.

    Attributes:
        module: the model that was wrapped.
        engine: what does the work; for this package's own modules and tests.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.module = engine.model
        self.engine = engine

    # ---- the model's face ---------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def __repr__(self) -> str:
        engine, placement = self.engine, self.placement
        stats, parts = engine.stats(), [f"rank {engine.comm.rank} of {engine.comm.num_ranks}"]
        parts.append(f"{placement.num_layers} MoE layers of {placement.num_experts} experts")
        parts.append(f"{placement.num_slots} slots per rank")
        parts.append(f"dispatch={engine.config.dispatch!r}")
        parts.append(f"experts computed by {engine.computed_by}")
        parts.append(f"placement version {stats.placement_version}")
        parts.append(stats.stage)
        parts += [f"{name}: {why}" for name, why in stats.why_not().items()]
        described = super().__repr__().partition("(")[2]
        return f"{type(self).__name__}({'; '.join(parts)}\n  {described.lstrip()}"

    # ---- the step clock -----------------------------------------------------------------------

    def step(self) -> None:
        """Count one forward that the hooks do not see: a replay of a captured CUDA or NPU graph,
        or a pass through the layers that is not made by calling the model.

        Call it before the replay or the pass, on every rank.
        """
        self.engine.boundary(is_forward=False)

    def idle_step(self) -> None:
        """Make a forward without tokens: for a rank that has no work while others have some.

        Joins their step with an empty batch in every MoE layer, and runs nothing else of the model,
        which need not be able to take an empty batch. With ``dispatch="all_to_all"``, once every
        layer has been called on this rank; without gradients.

        Raises:
            ValueError: another dispatch.
            EPLBError: a layer has not been called yet on this rank.
            PeerLostError: a rank did not come within ``timeout``.
        """
        self.engine.idle_step()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell which phase the forwards inside are: "prefill" or "decode"."""
        with self.engine.recorded.phase(name):
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not record the forwards inside: dummy batches, warm-up, padding."""
        with self.engine.recorded.paused():
            yield

    @contextlib.contextmanager
    def tokens(self, mask: torch.Tensor) -> Iterator[None]:
        """Tell which rows of the forwards inside are tokens; the others are padding.

        Padding is computed as ever, and not counted as load. For padding that need not be computed
        the router may give the expert id -1.

        Args:
            mask: bool (or integer, as attention masks are), with an entry per token of the
                forward, ``[T]`` or ``[batch, sequence]``; true where a row is a token.
        """
        with self.engine.tokens.of(mask.to(self.engine.comm.device)):
            yield

    # ---- what a user sees ---------------------------------------------------------------------

    @property
    def eplb_config(self) -> Config:
        """The settings; ``.config`` is the model's own, if it has one."""
        return self.engine.config

    @property
    def placement(self) -> Placement:
        """The present placement: where every logical expert is."""
        return self.engine.placement

    def stats(self) -> Stats:
        """State and totals since wrapping."""
        return self.engine.stats()

    def window_load(self) -> tuple[np.ndarray, np.ndarray] | None:
        """All ranks' tokens in the last collection window, or None before the first one.

        Returns:
            int64 ``[layers, experts]`` by logical expert, ``[layers, ranks]`` by the rank chosen.
            Waits for nothing.
        """
        return self.engine.window_load()

    def report(self) -> str:
        """State and totals as a table for people; ``print(balancer.report())``."""
        return report(self.stats(), self.placement, self.window_load())

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """This rank's recorded tokens since wrapping; sums over ranks give the whole load.

        Tokens that this rank sent; of layers that hand over ``token_counts``, those that it got.

        Returns:
            int64 ``[layers, experts]`` by logical expert, and int64 ``[layers, ranks]`` by the rank
            whose slot was chosen. Waits for the device.
        """
        return self.engine.load()

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The live tensors of a logical expert on this rank, by name; empty if it is not here.

        Views of the model's own memory: they are read and written in place.

        Raises:
            ValueError: there is no such layer or expert.
        """
        for name, value, end in (
            ("layer", layer, self.placement.num_layers),
            ("expert", expert, self.placement.num_experts),
        ):
            if not 0 <= value < end:
                raise ValueError(f"{name} must be in 0..{end - 1}, got {value}")
        return self.engine.expert(layer, expert)

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """This rank's expert parameters, ``[slots, ...]`` each or one per slot, of all layers.

        Under the same names other ranks have other experts: give them to whatever must leave such
        parameters alone, ``fully_shard(model, ignored_params=set(balancer.expert_parameters()))``.
        """
        for layer in self.engine.layers:
            for tensor in layer.tensors():
                if isinstance(tensor, nn.Parameter):
                    yield tensor

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads it from the module that it is given.
        ignored = getattr(self.module, "_ddp_params_and_buffers_to_ignore", ())
        return [f"module.{name}" for name in ignored]

    def register_rebalance_hook(self, hook: Callable[[CommittedRound], None]) -> RemovableHandle:
        """Call ``hook(committed)`` after every committed round, on every rank.

        It hears which slots hold another expert now and where that came from, in the boundary in
        which it happened, before the next forward: so that per-expert state that the library does
        not know can follow its expert. What it raises comes out of the forward (or of whatever
        committed the round); nothing of ours is undone by it.

        Returns:
            A handle whose ``remove()`` takes the hook off.
        """
        return self.engine.on_rebalance(hook)

    # ---- state --------------------------------------------------------------------------------

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The unwrapped model's state dict: its own keys, all experts in logical order.

        Collective; every rank gets it, and a rank that calls it alone waits for the others until
        ``timeout``. For checkpoints use `torch_eplb.ShardedState`, which gathers nothing;
        `torch_eplb.full_state_dict` has more options (rank 0 only, in host memory).
        ``balancer.module.state_dict()`` is this rank's own memory instead, an entry per slot.
        """
        state = full.full_state_dict(self, prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            return state
        destination.update(state)
        if hasattr(destination, "_metadata"):
            destination._metadata.update(getattr(state, "_metadata", {}))
        return destination

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the unwrapped model with its own ``save_pretrained``, on rank 0. Collective.

        See `torch_eplb.state.saving.save_pretrained`.
        """
        saving.save_pretrained(self, folder, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the unwrapped model's state dict into every replica of the present placement.

        Collective; see `torch_eplb.state.full.load_full_state_dict`.
        """
        return full.load_full_state_dict(self, state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Called by a module that contains this one and is being loaded.
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        missing, unexpected = full.load_nested(self, state_dict, prefix, assign)
        missing_keys += missing
        unexpected_keys += unexpected

    # ---- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop balancing: planner, step clock and process groups go, the model stays as it is.

        The experts stay sharded where they are, and the model goes on serving; `unwrap` gives the
        full model back. Collective while experts are moving: a round in flight is brought to its
        end first. Idempotent.
        """
        self.engine.close()

    def unwrap(self) -> nn.Module:
        """Give the model back with all its experts on every rank, and without hooks.

        Collective. Needs the memory of the full model.

        Returns:
            The model that was wrapped.

        Raises:
            PeerLostError: a rank did not come within ``timeout``.
        """
        self.engine.unwrap()
        return self.module

    def __enter__(self) -> ExpertLoadBalancer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # An exception on one rank: the others may not be coming, so nothing is waited for.
            self.engine.release()
