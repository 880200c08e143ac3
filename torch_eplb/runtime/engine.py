"""`Engine`: all that one wrapped model consists of, and how it lives.

    pre-hook of the model    the step's boundary: ranks behind catch up, the rebalance cycle does
                             what is due, and the user's hooks hear what was committed
      hooks of the layers    `layers.dispatch`: count, choose replicas, send tokens, bring them back
    post-hook of the model   the forward has ended

What needs all ranks at one boundary (saving, loading, moving to a placement, closing) goes through
`settle`. A life begins on the meta device or in balance, and ends closed and unwrapped; see `Life`.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_eplb.comm.agreement import agree, gather_json
from torch_eplb.comm.saved_tensors import without_saved_tensors_hooks
from torch_eplb.layers.context import LayerContext, recomputing
from torch_eplb.layers.dispatch import BoundToRanks, Dispatch, make_dispatch
from torch_eplb.layers.finding import common_owner
from torch_eplb.layers.gather import gather_layer
from torch_eplb.layers.graphs import forget_compiled
from torch_eplb.layers.hooks import capturing
from torch_eplb.layers.position import Position, Progress
from torch_eplb.layers.roster import Roster
from torch_eplb.migration.exchange import Exchange, StagingTooSmall
from torch_eplb.migration.progress import Migration
from torch_eplb.planner.process import Planner
from torch_eplb.policies.split import even_split
from torch_eplb.routing import LoadCounters, RoutingTables, split_batch
from torch_eplb.runtime import clock, owners
from torch_eplb.runtime.cycle import RebalanceCycle, Stage
from torch_eplb.runtime.guards import Guards
from torch_eplb.runtime.prepare import Setup, planner_settings, receives_directly
from torch_eplb.runtime.recording import MapWriter, RecordedSteps, StepRecorder
from torch_eplb.schedule.schedule import make_schedule
from torch_eplb.values.errors import EPLBError
from torch_eplb.values.events import CommittedRound
from torch_eplb.values.metrics import Stats
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan

__all__ = ["Engine", "Life"]

logger = logging.getLogger("torch_eplb")


class Life(enum.Enum):
    """What has become of a wrapped model."""

    ON_META = "its experts are on the meta device"
    BALANCING = "steps are counted and experts may move"
    OFF = "steps are counted and experts stay"
    FAILED = "nothing is agreed with other ranks any more"
    CLOSED = "planner and process groups are gone; the experts stay sharded"
    UNWRAPPED = "the model is as it was before wrapping"


class Engine(BoundToRanks):
    """The machinery of one wrapped model.

    Args:
        setup: the model, found fit to be wrapped on all ranks.

    Attributes:
        model: the model that was wrapped.
        config: its settings.
        comm: its process groups.
        layers: its MoE layers.
        position: where this rank is.
        exchange: what moves experts.
        recorded: which steps are recorded.
        guards: what keeps others from taking this rank's experts for everybody's.
        tokens: which rows of a forward are counted.
        written: what a boundary may write on the device, but experts.
    """

    def __init__(self, setup: Setup) -> None:
        self.model = setup.model
        self.config = setup.config
        self.comm = setup.comm
        self.layers = setup.layers
        self.position = Position(setup.placement.num_layers)
        self.recorded = RecordedSteps(setup.config.phase)
        self._hooks: OrderedDict[int, Callable[[CommittedRound], None]] = OrderedDict()
        self._committed: list[CommittedRound] = []
        self._hook_seconds = 0.0
        self._migration_seconds = 0.0
        on_meta = any(t.is_meta for layer in self.layers for t in layer.tensors())
        self._life = Life.ON_META if on_meta else Life.BALANCING
        self._reason: str | None = None  # why balancing is off, or has failed
        self._planner: Planner | None = None
        self._recorder: StepRecorder | None = None
        error: Exception | None = None
        try:
            self._make_parts(setup)
        except Exception as found:  # whatever it is, the other ranks must hear of it
            error = found
        try:
            agree(self.comm, {}, error)
        except BaseException:
            self._discard_parts()
            raise
        self._touch_model(setup)

    def _compile_solver(self, placement: Placement) -> None:
        """What is compiled for splits on the device is compiled now, and not in a forward."""
        tables = self._tables
        nothing_E = torch.zeros(placement.num_experts, dtype=torch.int64, device=self.comm.device)
        sizes = placement.num_ranks, placement.num_slots
        split_batch(nothing_E, tables.solver_LEM[0], *sizes, tables.weight_tokens)

    def _make_parts(self, setup: Setup) -> None:
        """All that may fail on one rank alone: memory, files. The model is not touched yet."""
        config, comm, placement = setup.config, setup.comm, setup.placement
        counts_arrivals = any(layer.spec.token_counts is not None for layer in self.layers)
        with torch.inference_mode(False):
            self._counters = LoadCounters(
                placement.num_layers, placement.num_experts, comm.num_ranks, comm.device
            )
            assert config.replica_choice is not None
            self._tables = RoutingTables(
                placement,
                device=comm.device,
                rank=comm.rank,
                replica_choice=config.replica_choice,
                max_replicas=min(comm.num_ranks, config.num_redundant_experts + 1),
                topology=setup.topology,
                prefer_local=not config.dispatch_kind.shares_tokens,
                weight_tokens=setup.weight_tokens,
                keep_experts=counts_arrivals,
            )
            # All-to-all solves the batch of all ranks on the host, which needs the sizes anyway.
            on_host = config.dispatch == "all_to_all" and config.replica_choice == "batch"
            if config.replica_choice in ("batch", "local") and not on_host:
                self._compile_solver(placement)
        self.written = [*self._tables.tensors(), *self._counters.tensors()]
        self.exchange = Exchange(self.layers, comm, setup.staging_bytes, config.verify)
        if config.record_path is not None:
            self._recorder = StepRecorder(
                str(config.record_path),
                comm,
                self._counters,
                config.dispatch_kind,
                knows_sources=not counts_arrivals,
            )
        map_writer = None
        if config.record_map_path is not None and comm.rank == 0:
            map_writer = MapWriter(str(config.record_map_path))
        self._map_writer = map_writer
        settings = planner_settings(setup)
        if comm.leads:
            self._planner = Planner(settings, timeout=config.timeout)
        self._migration = Migration(
            placement, self._tables, self.exchange, comm, self._committed.append
        )
        self._cycle = RebalanceCycle(
            config,
            comm,
            self.position,
            self._counters,
            self._migration,
            self._planner,
            settings.bounds,
            give_up=self._turn_off,
            write_map=map_writer,
        )

    def _discard_parts(self) -> None:
        """Some rank could not make its own: the model stays as it was on all of them."""
        if self._planner is not None:
            self._planner.close()
        owners.release(layer.module for layer in self.layers)
        self.comm.close()

    def _touch_model(self, setup: Setup) -> None:
        """Shard the experts and install the hooks, on all ranks alike."""
        self._roster = Roster(self.comm, type(self.model).__name__, len(self.layers))
        context = LayerContext(
            self.comm,
            self._tables,
            self._counters,
            self.position,
            self._roster,
            experts=self.config.experts,
            max_tokens_per_rank=self.config.max_tokens_per_rank,
            owner=self,
        )
        owners.take([layer.module for layer in self.layers], self)
        self.tokens = context.tokens
        self._traffic = context.traffic
        held = setup.placement.experts[:, self.comm.rank]
        for layer, experts in zip(self.layers, held, strict=True):
            if not setup.already_sharded:
                layer.shard(experts.tolist())
        self._dispatches: list[Dispatch] = [
            make_dispatch(layer, index, context, self.config.dispatch_kind)
            for index, layer in enumerate(self.layers)
        ]
        self.guards = Guards(self.model, self.layers, self.config)
        self._number = clock.register(self)
        clocked = common_owner(self.model, [layer.name for layer in self.layers])
        self._step_hooks = [
            clocked.register_forward_pre_hook(self._before_forward, prepend=True),
            clocked.register_forward_hook(self._after_forward),
        ]
        forget_compiled()
        # A model that is dropped without close() must leave nothing behind; the planner ends by
        # itself, the groups must be given back.
        self._give_groups_back = weakref.finalize(self, self.comm.close)

    # ---- its life -----------------------------------------------------------------------------

    @property
    def life(self) -> Life:
        """What has become of the model."""
        self._notice_loss()
        return self._life

    def _notice_loss(self) -> None:
        """A loss that a layer's dispatch has met ends balancing as well."""
        if self.comm.failure is not None and self._life in (Life.BALANCING, Life.OFF):
            self._fail(self.comm.failure)

    @property
    def agrees(self) -> bool:
        """Whether this rank still agrees with the others on anything."""
        return self.life in (Life.ON_META, Life.BALANCING, Life.OFF)

    @property
    def is_open(self) -> bool:
        """Whether `close` is still to be called."""
        return self.life not in (Life.CLOSED, Life.UNWRAPPED)

    def _turn_off(self, reason: str) -> None:
        """Nothing moves any more, and the model goes on serving."""
        logger.error("balancing is off: %s; serving goes on", reason)
        self._life, self._reason = Life.OFF, reason

    def _fail(self, error: EPLBError) -> None:
        """Balancing ends; weights and routes are those of the last commit.

        The model can still be saved, or go on if it can do without the lost rank.
        """
        if self._life is not Life.FAILED:
            self._life, self._reason = Life.FAILED, str(error)
            self.position.counts = False  # nobody waits for a step of this rank any more
            logger.error("rank %d: balancing ends: %s", self.comm.rank, self._reason)
            self.comm.abandon_data_plane()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """An `EPLBError` inside ends balancing; experts that have grown stay where they are."""
        try:
            yield
        except EPLBError as error:
            self._fail(error)
            raise
        except StagingTooSmall as error:
            with self._failing():
                if self.in_flight:  # posted before they grew; every rank has started it
                    self._migration.wait()
            self._migration.give_up()
            self._turn_off(str(error))
            raise

    def require_weights(self, action: str) -> None:
        """Raise if the experts are on the meta device; once they are not, that is for good.

        Raises:
            RuntimeError: ``action`` needs weights.
        """
        if self._life in (Life.BALANCING, Life.OFF, Life.UNWRAPPED):
            return
        for layer in self.layers:
            for name, tensor in layer.named_tensors():
                # A model that was closed may have been moved since.
                elsewhere = tensor.device != self.comm.device
                if tensor.is_meta or (elsewhere and self._life is Life.ON_META):
                    raise RuntimeError(
                        f"cannot {action}: {layer.name}.{name} is on the {tensor.device} device. "
                        "A model that was wrapped on the meta device gets its weights from "
                        f"torch_eplb.load_pretrained, on {self.comm.device}, which its process "
                        "group serves"
                    )
        if self._life is Life.ON_META:
            self._life = Life.BALANCING
            self.guards.remember()  # loading has replaced what was on the meta device

    # ---- the step clock -----------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            # In a graph the boundary is one opaque operation that runs at every call.
            clock.begin_step(self.written, self._number)
        elif not recomputing():
            self.begin_forward()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.position.progress = Progress.IDLE

    def begin_forward(self) -> None:
        """The boundary before a forward that is about to be made.

        A forward that raised before it had exchanged anything with other ranks has not been a step:
        they are still in it, waiting for this rank, and this forward takes its place. Where the
        layers dispatch by themselves this cannot be known; there every forward counts.
        """
        is_retry = self.position.progress is Progress.BEGUN
        if is_retry and self.config.dispatch_kind.communicates:
            self._counters.set_recording(self.recorded.wants())
        else:
            self.boundary()
        self.position.progress = Progress.BEGUN

    def boundary(self, is_forward: bool = True) -> None:
        """Count one forward, and do what is due before it. Every rank calls it as often.

        Args:
            is_forward: False for a pass of which the hooks may see nothing.

        Raises:
            PeerLostError: a rank died or was silent for ``timeout`` seconds.
            EPLBError: ranks have made different numbers of forwards, or are in different models.
            ValueError: the experts are not those that were wrapped any more, or have grown: then
                nothing moves from now on, and the next forward is made.
        """
        if capturing(self.comm.device):
            return  # no step is made
        self.require_weights("run a forward")
        self.position.begin(is_forward)
        layer = self.guards.check_one()
        if self.life is Life.BALANCING:
            with self._failing():
                self.exchange.require_room(layer)
        self.catch_up()
        if self._life is Life.BALANCING and not self.config.overlap:
            self._call_roster()
        if self.agrees:
            self._pass_boundary()
        self.position.progress = Progress.IDLE
        self._tell_hooks()

    def _call_roster(self) -> None:
        """Before a boundary that may wait for transfers: where several models are wrapped, make
        sure that all ranks are in this one, or they would be waited for until the time limit."""
        if self.position.progress is not Progress.BETWEEN_LAYERS:  # then it waits for nothing
            self._roster.call(self.position.at(len(self.layers)))

    def idle_step(self) -> None:
        """Make a forward without tokens, for other ranks that have some.

        Raises:
            ValueError: the dispatch has no such thing.
            EPLBError: a layer has not been called yet on this rank.
        """
        kind = self.config.dispatch_kind
        if not kind.own_batches:
            raise ValueError(
                f"idle_step: with dispatch={kind.name!r} all ranks hold the same batch, so none is "
                "without work when another has some"
            )
        if not kind.communicates:
            raise ValueError(
                f"idle_step: with dispatch={kind.name!r} the layers dispatch by themselves; let "
                "them run an empty batch, and call balancer.step() if the model's forward is not "
                "called"
            )
        with torch.no_grad():
            self.begin_forward()
            for dispatch in self._dispatches:
                dispatch.visit()
            self.position.progress = Progress.IDLE

    def catch_up(self) -> None:
        """After a forward that not every rank made, those behind pass the others' boundaries, too.

        Also before whatever else ranks do together: it takes them to be at the same boundary.
        """
        while self.position.is_behind and self.agrees:
            self._pass_boundary()

    def _pass_boundary(self) -> None:
        self.comm.check_process()
        start, moving = time.perf_counter(), self._cycle.stage is Stage.MIGRATE
        try:
            # Hooks on saved tensors: what is posted here may outlive this forward.
            with without_saved_tensors_hooks(), self._failing():
                if self._recorder is not None and self.position.step > 0:
                    self._recorder.boundary()
                if self._life is Life.BALANCING:
                    self._cycle.boundary()
                self._counters.set_recording(self.recorded.wants())
        finally:
            self.position.step += 1
            took = time.perf_counter() - start
            self._hook_seconds += took
            if moving or self._cycle.stage is Stage.MIGRATE:
                self._migration_seconds += took

    # ---- what ranks do together ---------------------------------------------------------------

    def settle(self) -> None:
        """Bring all ranks to one boundary, and a round in flight to its end. Collective.

        Afterwards nothing reads or writes weights until the next boundary. Without effect where
        nothing is agreed any more.

        Raises:
            PeerLostError: a rank did not come within ``timeout``.
        """
        if not self.agrees:
            return
        with self._failing():
            self.catch_up()
            if self.life is Life.BALANCING:
                self._cycle.drain()
        self._tell_hooks()

    def gather(self, value: Any) -> dict[int, Any]:
        """What every rank passes (JSON values), by rank; only this rank's where nothing is agreed.
        Collective."""
        if not self.agrees:
            return {self.comm.rank: value}
        return dict(enumerate(gather_json(self.comm, value)))

    def move_to(self, wanted: Placement) -> int:
        """Move experts to a placement now, and go on balancing from there. Collective.

        Returns:
            How many experts moved.

        Raises:
            PeerLostError: a rank did not come within ``timeout``.
        """
        if self.life is not Life.BALANCING:
            logger.warning("balancing has ended: experts stay where they are")
            return 0
        self.settle()
        config, before = self.config, self._migration.experts_moved
        schedule = make_schedule(
            self.placement,
            wanted,
            expert_bytes=[layer.expert_bytes for layer in self.layers],
            staging_bytes=self.exchange.staging_bytes,
            direct=receives_directly(config, self.layers),
            layers_per_round=config.layers_per_step,
            send_bytes_per_round=config.bytes_per_step,  # type: ignore[arg-type]
        )
        target = schedule.target
        plan = Plan(target, even_split(target), np.full(target.num_layers, np.nan))
        with self._failing():
            self._cycle.carry_out(plan, schedule.rounds)
        self._tell_hooks()
        return self._migration.experts_moved - before

    # ---- where experts are --------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """The committed placement."""
        return self._migration.placement

    @property
    def live(self) -> NDArray[np.bool_]:
        """``[layers, ranks, slots]``; False where a slot is drained and may be overwritten."""
        return self._migration.live

    @property
    def computed_by(self) -> str:
        """Who computes experts, in words."""
        return " or ".join(sorted({dispatch.computed_by for dispatch in self._dispatches}))

    @property
    def in_flight(self) -> bool:
        """Whether a round of transfers was posted and has not ended."""
        return self._migration.in_flight

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The live tensors of a logical expert on this rank, by name; empty if it is not here."""
        here = (self.placement.experts[layer] == expert) & self.live[layer]
        slots = np.flatnonzero(here[self.comm.rank]).tolist()
        if not slots:
            return {}
        names, tensors = self.layers[layer].tensor_names, self.layers[layer].slot(slots[0])
        return dict(zip(names, tensors, strict=True))

    def on_rebalance(self, hook: Callable[[CommittedRound], None]) -> RemovableHandle:
        """Call ``hook`` after every committed round."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def _tell_hooks(self) -> None:
        """Tell what was committed since the last time, when all of it is done."""
        while self._committed:
            committed = self._committed.pop(0)
            for hook in list(self._hooks.values()):
                hook(committed)

    # ---- what has been ------------------------------------------------------------------------

    def load(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """This rank's tokens ``[layers, experts]``, ``[layers, ranks]``; waits for the device."""
        values = self._counters.values.cpu().numpy()
        experts = self._counters.num_experts
        return values[:, :experts].copy(), values[:, experts:].copy()

    def window_load(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """All ranks' tokens of the last window; what the host knows, so it waits for nothing."""
        return self._cycle.window_load

    def stats(self) -> Stats:
        """State and totals since wrapping."""
        self._notice_loss()
        cycle, migration, exchange = self._cycle, self._migration, self.exchange
        ended = cycle.rebalanced_at  # by the model's thread; this may be another
        return Stats(
            step=self.position.step,
            stage=cycle.stage.value if self.is_open else "closed",
            rebalances=cycle.rebalances,
            early_plans=cycle.early_plans,
            seconds_since_rebalance=None if ended is None else time.monotonic() - ended,
            placement_version=migration.version,
            experts_moved=migration.experts_moved,
            par_now=cycle.present.values.tolist(),
            par_measured=cycle.par_measured.tolist(),
            par_predicted=cycle.par_predicted.tolist(),
            bytes_sent=exchange.bytes_sent,
            bytes_received=exchange.bytes_received,
            token_rows_sent=self._traffic.rows,
            token_bytes_sent=self._traffic.nbytes,
            active_experts=self._traffic.mean_active,
            staging_bytes=exchange.staging_bytes,
            staging_bytes_peak=exchange.staging_peak,
            plan_seconds=cycle.plan_seconds,
            hook_seconds=self._hook_seconds,
            migration_seconds=self._migration_seconds,
            plans_failed=cycle.plans_failed,
            planner_restarts=self._planner.restarts if self._planner else 0,
            rebalances_abandoned=cycle.abandoned,
            writes_failed=sum(
                writer.failures for writer in (self._recorder, self._map_writer) if writer
            ),
            stalled=cycle.stalled or self.position.stalled,
            disabled=self._reason,
        )

    # ---- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop balancing; collective while experts are moving. Idempotent."""
        if not self.is_open:
            return
        try:
            if not self.comm.forked:
                self.settle()
                if self._recorder is not None and self.agrees:
                    self._recorder.boundary()
        except EPLBError as error:
            logger.error("rank %d: closed with a peer lost: %s", self.comm.rank, str(error))
        finally:
            self.release()

    def release(self) -> None:
        """Give back what this rank holds; talks to nobody. Idempotent."""
        if not self.is_open:
            return
        self._life = Life.CLOSED
        self.position.counts = False
        for hook in self._step_hooks:
            hook.remove()
        if self._planner is not None:
            self._planner.close()
        if self._recorder is not None and not self.comm.forked:
            with contextlib.suppress(EPLBError):
                self._recorder.close()
        self._give_groups_back()

    def unwrap(self) -> None:
        """Give all ranks all experts and take the hooks off; then close. Collective. Idempotent."""
        if self.life is Life.UNWRAPPED:
            return
        self.require_weights("unwrap")
        self.comm.check_process()
        self.settle()
        experts = self.placement.experts
        for index, layer in enumerate(self.layers):
            layer.restore(gather_layer(layer, experts[index], self.live[index], self.comm))
        for dispatch in self._dispatches:
            dispatch.remove()
        self.guards.remove()
        forget_compiled()
        self._roster.leave()
        owners.release(layer.module for layer in self.layers)
        self.close()
        self._life = Life.UNWRAPPED
