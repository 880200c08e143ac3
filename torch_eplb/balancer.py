"""`wrap` and `ExpertLoadBalancer`: the story of one step.

    forward of the wrapped model
      | pre-hook of the model    the step's boundary: `RebalanceCycle` does what is due
      |   pre-hook of a layer    count, choose replicas, send tokens to their slots' ranks
      |     experts' forward     computes whatever arrived, on this rank's slots
      |   post-hook of a layer   bring the results back, weight and sum them
      v   ... next layer

This room puts the others together; which of them may know which is in the README's architecture
section.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from torch_eplb.comm.communicator import Communicator
from torch_eplb.files.expert_map import write_expert_map
from torch_eplb.layers.dispatch import BoundToRanks, Dispatch, make_dispatch
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.gather import gather_layer
from torch_eplb.layers.position import RoutingState
from torch_eplb.migration.exchange import Exchange
from torch_eplb.migration.progress import Migration
from torch_eplb.planner.process import Planner, PlannerSettings
from torch_eplb.routing import LoadCounters, RoutingTables
from torch_eplb.runtime import clock
from torch_eplb.runtime.config import Config
from torch_eplb.runtime.cycle import RebalanceCycle
from torch_eplb.runtime.prepare import Setup, prepare, release
from torch_eplb.runtime.recording import StepRecorder
from torch_eplb.state import full as checkpoint
from torch_eplb.values.choices import PHASES
from torch_eplb.values.errors import EPLBError
from torch_eplb.values.metrics import Stats
from torch_eplb.values.placement import Placement

__all__ = ["ExpertLoadBalancer", "wrap"]

logger = logging.getLogger("torch_eplb")


def wrap(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, **kwargs: Any
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
        process_group: the expert-parallel ranks; None is the default group.
        **kwargs: the fields of `torch_eplb.Config`.

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
    return ExpertLoadBalancer(prepare(model, process_group, kwargs))


class ExpertLoadBalancer(BoundToRanks, nn.Module):
    """A model whose experts are sharded and balanced; made by `wrap`.

    Its forward is the model's. Unknown attributes are looked up on the model. The hooks sit on the
    model itself, so ``balancer.module.generate(...)`` balances as well.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.module = setup.model
        self.config: Config = setup.config
        self._comm: Communicator = setup.comm
        self._layers: list[ExpertLayer] = setup.layers
        config, comm, placement = setup.config, setup.comm, setup.placement
        with torch.inference_mode(False):
            counters = LoadCounters(
                placement.num_layers, placement.num_experts, comm.num_ranks, comm.device
            )
            assert config.replica_choice is not None
            tables = RoutingTables(
                placement,
                device=comm.device,
                rank=comm.rank,
                replica_choice=config.replica_choice,
                max_replicas=min(comm.num_ranks, config.num_redundant_experts + 1),
                topology=setup.topology,
                prefer_local=config.dispatch != "all_reduce",
            )
        self._counters = counters
        self._tables = tables
        self._state = state = RoutingState(
            comm, tables, counters, config.replica_choice, num_slots=placement.num_slots
        )
        for layer, experts in zip(self._layers, placement.experts[:, comm.rank], strict=True):
            if not setup.already_sharded:
                layer.shard(experts.tolist())
        exchange = Exchange(self._layers, comm, setup.staging_bytes, config.verify)
        self._exchange = exchange
        self._planner = _make_planner(setup) if comm.rank == 0 or comm.fake else None
        self._migration = Migration(placement, tables, exchange, comm)
        self._cycle = RebalanceCycle(
            config, comm, counters, self._migration, self._planner, self._map_writer()
        )
        self._recorder = (
            StepRecorder(str(config.record_path), comm, counters, config.dispatch)
            if config.record_path is not None
            else None
        )
        self._dispatches: list[Dispatch] = [
            make_dispatch(layer, index, state, config.dispatch)
            for index, layer in enumerate(self._layers)
        ]
        self._clock = clock.register(self)
        self._step_hooks = [
            self.module.register_forward_pre_hook(self._before_step, prepend=True),
            self.module.register_forward_hook(self._after_step),
        ]
        self._step = 0
        self._forward_under_way = False
        self._hook_seconds = 0.0
        self._phase: str | None = None
        self._paused = 0
        self._closed = False
        self._failure: str | None = None
        self._unwrapped = False
        self._warned_about_phase = False
        self._on_meta = any(t.is_meta for layer in self._layers for t in layer.tensors())
        # A wrapper that is dropped without close() must leave nothing behind; the planner ends by
        # itself, the groups must be given back.
        self._finalizer = weakref.finalize(self, comm.close)

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

    # ---- the step clock -----------------------------------------------------------------------

    def _before_step(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            # In a graph the boundary is one opaque operation that runs at every call.
            clock.begin_step(self._tables.slots_LEM, self._counters.values, self._clock)
            return
        if self._is_retry():
            self._counters.set_recording(self._wants_recording())
        else:
            self._boundary()
        self._forward_under_way = True

    def _after_step(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._forward_under_way = False

    def _is_retry(self) -> bool:
        """Whether the last forward raised before it had exchanged anything with other ranks.

        They are still in that step, waiting for this rank, so the next forward takes its place.
        Where the layers dispatch by themselves this cannot be known; there every forward counts.
        """
        interrupted = self._forward_under_way and not self._state.entered
        return interrupted and self.config.dispatch != "external"

    def _boundary(self) -> None:
        if _capturing(self._comm.device):
            return
        if self._on_meta:
            self._refuse_meta("run a forward")
        self._catch_up()
        self._state.entered = False
        if not (self._closed or self._failed):
            self._pass_boundary()
        # Only after an error: nobody waits for a step of this rank any more.
        self._state.step = -1 if self._closed or self._failed else self._step - 1

    def _catch_up(self) -> None:
        """After a forward that not every rank made, those behind pass the others' boundaries, too.

        Also before whatever else ranks do together: it takes them to be at the same boundary.
        """
        while self._step <= self._state.latest_step and not (self._closed or self._failed):
            self._pass_boundary()

    def _pass_boundary(self) -> None:
        self._comm.check_process()
        # Where the last forward ended between two layers, others may wait in the second of them.
        together = not (self._forward_under_way and self._state.between_layers)
        start = time.perf_counter()
        try:
            if self._recorder is not None and self._step > 0:
                self._recorder.boundary()
            self._cycle.boundary(self._step, together)
            self._counters.set_recording(self._wants_recording())
        except EPLBError as error:
            # Weights and routes are those of the last commit. Balancing ends here; the model can
            # still be saved, or go on if it can do without the lost rank.
            self._failure = str(error)
            logger.error("rank %d: balancing ends: %s", self._comm.rank, self._failure)
            raise
        finally:
            self._step += 1
            self._hook_seconds += time.perf_counter() - start

    @property
    def _failed(self) -> bool:
        """Whether an error has ended balancing."""
        return self._failure is not None

    def step(self) -> None:
        """Count one forward that the hooks do not see: a replay of a captured CUDA or NPU graph.

        Call it before the replay, on every rank.
        """
        self._boundary()

    def _wants_recording(self) -> bool:
        if self._paused:
            return False
        wanted = self.config.phase
        if wanted == "all" or self._phase == wanted:
            return True
        if self._phase is None and not self._warned_about_phase:
            self._warned_about_phase = True
            logger.warning(
                "phase=%r, but the model runs outside of balancer.phase(...): such steps are not "
                "recorded",
                wanted,
            )
        return False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tell which phase the forwards inside are: "prefill" or "decode"."""
        if name not in PHASES[1:]:
            raise ValueError(f"phase must be one of {', '.join(PHASES[1:])}, got {name!r}")
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not record the forwards inside: dummy batches, warm-up, padding."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # ---- what a user sees ---------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """The present placement: where every logical expert is."""
        return self._migration.placement

    def stats(self) -> Stats:
        """State and totals since wrapping."""
        cycle, migration, exchange = self._cycle, self._migration, self._exchange
        return Stats(
            step=self._step,
            stage="closed" if self._closed else cycle.stage.value,
            rebalances=cycle.rebalances,
            placement_version=migration.version,
            experts_moved=migration.experts_moved,
            par_measured=cycle.par_measured.tolist(),
            par_predicted=cycle.par_predicted.tolist(),
            bytes_sent=exchange.bytes_sent,
            bytes_received=exchange.bytes_received,
            staging_bytes=exchange.staging_bytes,
            staging_bytes_peak=exchange.staging_peak,
            plan_seconds=cycle.plan_seconds,
            hook_seconds=self._hook_seconds,
            plans_failed=cycle.plans_failed,
            planner_restarts=self._planner.restarts if self._planner else 0,
            rebalances_abandoned=cycle.abandoned,
            stalled=cycle.stalled,
            disabled=cycle.disabled or self._failure,
        )

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """This rank's recorded tokens since wrapping; sums over ranks give the whole load.

        Returns:
            int64 ``[layers, experts]`` by logical expert, and int64 ``[layers, ranks]`` by the rank
            whose slot was chosen. Waits for the device.
        """
        values = self._counters.values.cpu().numpy()
        experts = self._counters.num_experts
        return values[:, :experts].copy(), values[:, experts:].copy()

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The live tensors of a logical expert on this rank, by name; empty if it is not here.

        Views of the model's own memory: they are read and written in place.
        """
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"layer must be in 0..{len(self._layers) - 1}, got {layer}")
        if not 0 <= expert < self.placement.num_experts:
            raise ValueError(f"expert must be in 0..{self.placement.num_experts - 1}, got {expert}")
        rank = self._comm.rank
        here = (self._migration.experts[layer, rank] == expert) & self._migration.live[layer, rank]
        if not here.any():
            return {}
        slot = int(np.flatnonzero(here)[0])
        names, tensors = self._layers[layer].tensor_names, self._layers[layer].tensors()
        return {name: tensor[slot] for name, tensor in zip(names, tensors, strict=True)}

    # ---- state --------------------------------------------------------------------------------

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The unwrapped model's state dict: its own keys, all experts in logical order.

        Collective; every rank gets it. ``torch_eplb.state.full.full_state_dict`` has more options
        (rank 0 only, in host memory). ``balancer.module.state_dict()`` is this rank's own memory
        instead, with one entry per slot.
        """
        state = checkpoint.full_state_dict(self, prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            return state
        destination.update(state)
        if hasattr(destination, "_metadata"):
            destination._metadata.update(getattr(state, "_metadata", {}))
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the unwrapped model's state dict into every replica of the present placement.

        Collective; see `torch_eplb.state.full.load_full_state_dict`.
        """
        return checkpoint.load_full_state_dict(self, state_dict, strict=strict, assign=assign)

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
        missing, unexpected = checkpoint.load_nested(self, state_dict, prefix, assign)
        missing_keys += missing
        unexpected_keys += unexpected

    def _refuse_meta(self, action: str) -> None:
        """Raise if the experts are on the meta device; once they are not, that is for good."""
        if not self._on_meta:
            return
        for layer in self._layers:
            for name, tensor in zip(layer.tensor_names, layer.tensors(), strict=True):
                if tensor.device != self._comm.device:
                    raise RuntimeError(
                        f"cannot {action}: {layer.name}.{name} is on the {tensor.device} device. "
                        "A model that was wrapped on the meta device gets its weights from "
                        f"torch_eplb.load_pretrained, on {self._comm.device}, which its process "
                        "group serves"
                    )
        self._on_meta = False

    def _drain(self) -> None:
        """Let nothing be in flight that could write weights. Collective."""
        if self._closed or self._failed:
            return
        try:
            self._settle()
        except EPLBError as error:
            self._failure = str(error)
            raise

    def _settle(self) -> None:
        """Bring all ranks to one boundary, and a round in flight to its end. Collective."""
        self._catch_up()
        self._cycle.drain(self._step)

    # ---- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop balancing: planner, step clock and process groups go, the model stays as it is.

        The experts stay sharded where they are, and the model goes on serving; `unwrap` gives the
        full model back. Collective while experts are moving: a round in flight is brought to its
        end first. Idempotent.
        """
        if self._closed:
            return
        try:
            if not (self._failed or self._comm.forked):
                self._settle()
                if self._recorder is not None:
                    self._recorder.boundary()
        except EPLBError as error:
            logger.error("rank %d: closed with a peer lost: %s", self._comm.rank, str(error))
        finally:
            self._release()

    def _release(self) -> None:
        """Give back what this rank holds; talks to nobody."""
        self._closed = True
        self._state.step = -1
        for hook in self._step_hooks:
            hook.remove()
        if self._planner is not None:
            self._planner.close()
        if self._recorder is not None and not self._comm.forked:
            with contextlib.suppress(EPLBError):
                self._recorder.close()
        self._finalizer()

    def unwrap(self) -> nn.Module:
        """Give the model back with all its experts on every rank, and without hooks.

        Collective. Needs the memory of the full model.

        Returns:
            The model that was wrapped.

        Raises:
            PeerLostError: a rank did not come within ``timeout``.
        """
        if not self._unwrapped:
            self._refuse_meta("unwrap")
            self._comm.check_process()
            if not self._closed:
                self._settle()
            for index, layer in enumerate(self._layers):
                experts = self._migration.experts[index]
                layer.restore(gather_layer(layer, experts, self._migration.live[index], self._comm))
            for dispatch in self._dispatches:
                dispatch.remove()
            self._unwrapped = True
            release(self._layers)
            self.close()
        return self.module

    def __enter__(self) -> ExpertLoadBalancer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            # An exception on one rank: the others may not be coming, so nothing is waited for.
            self._release()

    def _map_writer(self) -> Any:
        path = self.config.record_map_path
        if path is None or self._comm.rank != 0:
            return None
        return lambda placement: write_expert_map(os.fspath(path), placement)


def _make_planner(setup: Setup) -> Planner:
    config = setup.config
    options = {"replica_choice": config.replica_choice, "max_moves": config.max_moves}
    for name in ("min_gain", "target_par"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    settings = PlannerSettings(
        policy=config.policy,
        policy_options=options,
        topology=setup.topology,
        expert_bytes=tuple(layer.expert_bytes for layer in setup.layers),
        staging_bytes=setup.staging_bytes,
        direct=config.direct,
        layers_per_round=config.layers_per_step,
        send_bytes_per_round=config.bytes_per_step,  # type: ignore[arg-type]
    )
    return Planner(settings, timeout=config.timeout)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA (or NPU) graph is being captured: then no step is made."""
    if device.type == "cpu":
        return False
    module = torch.get_device_module(device)
    return bool(getattr(module, "is_current_stream_capturing", lambda: False)())
