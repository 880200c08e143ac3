"""The rebalance cycle: a state machine that every rank runs in lockstep, one boundary per step.

A boundary is the moment before a forward. All ranks make the same forwards, so "boundary 812" means
the same thing everywhere, and whatever changes weights or routing happens at the same boundary on
all ranks. What a rank cannot know by counting (has everybody's transfer finished? has rank 0's
planner answered?) is agreed by a tiny all-reduce that is started at one boundary and read at the
next, so that nobody waits for a message that was not already under way for a whole forward.

    COLLECT  count, and look at the load now and then; where it has drifted the window begins at
             once; at the window's end copies of the counters are under way
    SAMPLE   every rank has its copies                        -> the load reduction is started
    PLAN     rank 0 has the sum, asks the planner             -> the broadcast is started
    RECEIVE  every rank has the plan
    WAIT     until plan_interval steps after collection, but not where the load has drifted
    MIGRATE  the split changes at once; then round after round: drain, post, agree, commit

Without overlap a round is received in the boundary that posts it; when every rank has it is agreed
on beside the forward all the same, and it is committed at the next boundary.

Any failure on the way ends the cycle with the present placement, and the next one begins.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from torch_eplb.comm.communicator import Communicator
from torch_eplb.layers.position import Position, Progress
from torch_eplb.migration.progress import Migration
from torch_eplb.planner.broadcast import ReceivedPlan, decode_plan
from torch_eplb.planner.process import Planner
from torch_eplb.policies.drift import Drift, cut_short
from torch_eplb.policies.split import par
from torch_eplb.routing.load import LoadCounters, SampleWindow, split_samples
from torch_eplb.runtime.config import Config
from torch_eplb.runtime.present import PresentPar
from torch_eplb.values.errors import EPLBError
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan
from torch_eplb.values.rounds import Bounds, Round

__all__ = ["RebalanceCycle", "Stage"]

logger = logging.getLogger("torch_eplb")

# Progress that ranks report, in the order of a cycle; round k is done at _ROUNDS + k + 1.
_SAMPLED, _HAVE_PLAN, _ROUNDS = 1, 2, 2
# What rank 0 says about the plan; others say _UNKNOWN, which the minimum ignores.
_UNKNOWN, _NO_PLAN, _NOTHING_RECORDED = 2**62, -1, -2
_OK, _CHECKSUM_FAULT, _PLAN_FAULT = 0, 1, 2
# Rounds of a new plan that a rank checks at one boundary: two milliseconds for a large model.
_CHECKED_AT_ONCE = 8


class Stage(enum.Enum):
    """What a cycle is doing."""

    COLLECT = "collecting load"
    SAMPLE = "waiting for every rank's samples"
    PLAN = "waiting for the plan"
    RECEIVE = "waiting for every rank to have the plan"
    WAIT = "waiting for plan_interval to pass"
    MIGRATE = "moving experts"


class RebalanceCycle:
    """Drives collection, planning and migration.

    Args:
        config: when and how.
        comm: what ranks agree by.
        position: the step clock; stages are timed by it.
        counters: the load.
        migration: carries plans out.
        planner: makes them, on the rank that leads.
        bounds: what a round may take; every rank holds plans to it.
        give_up: called with the reason when balancing must end for good.
        write_map: called with what a plan wants, instead of carrying it out.

    Attributes:
        stage: the same on all ranks, or they would wait for each other until the time limit.
        par_measured, par_predicted: float ``[layers]``; see `torch_eplb.Stats`.
        present: PAR over the last steps.
        rebalances, early_plans, plans_failed, abandoned, plan_seconds: see `torch_eplb.Stats`.
        rebalanced_at: when the last rebalance ended, by `time.monotonic`; None before the first.
        stalled: why nothing has progressed for long, or None.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        position: Position,
        counters: LoadCounters,
        migration: Migration,
        planner: Planner | None,
        bounds: Bounds,
        *,
        give_up: Callable[[str], None],
        write_map: Callable[[Placement], None] | None = None,
    ) -> None:
        self._config = config
        self._comm = comm
        self._position = position
        self._give_up = give_up
        self._migration = migration
        self._planner = planner
        self._bounds = bounds
        self._write_map = write_map
        self._window = SampleWindow(counters, config.collect_interval, config.window)
        self._num_experts = counters.num_experts
        num_layers = counters.values.shape[0]
        self.present = PresentPar(comm, self._window, num_layers)
        self.par_measured: NDArray[np.float64] = np.full(num_layers, np.nan)
        self.window_load: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self.par_predicted: NDArray[np.float64] = np.full(num_layers, np.nan)
        self._drift = Drift(num_layers, config.replan_above)
        self.early_plans = 0
        self.rebalances = 0
        self.rebalanced_at: float | None = None
        self.plans_failed = 0
        self.abandoned = 0
        self.plan_seconds = 0.0
        self.stalled: str | None = None
        self._stall_limit = max(1000, 10 * (config.plan_interval + 1))
        self._cycle = 0
        self._draining = False
        self._may_post = True  # whether the next round is posted at this boundary
        self._begin()

    # ---- the boundary -------------------------------------------------------------------------

    def boundary(self) -> None:
        """Do what is due before the forward to come.

        Waits for nothing that was not under way for a whole forward; but without overlap, when a
        round is due, until it is received.

        Raises:
            PeerLostError: a rank died or was silent for ``timeout`` seconds.
            EPLBError: ranks have made different numbers of forwards.
        """
        # Where the last forward ended between two layers on this rank, others may wait in the
        # second of them: without overlap a round would wait for ranks that wait for this one.
        together = self._position.progress is not Progress.BETWEEN_LAYERS
        self._may_post = together or self._config.overlap
        if self.stage is Stage.COLLECT:
            since = self._waited
            self._window.step(since)
            if since < self._collect_until:
                if self.present.step(since) and not self._early:
                    self._look_for_drift(since)
                return
            self._window.finish(since)
            self._window_end = self._position.step
            self._enter(Stage.SAMPLE)
        elif self.stage is Stage.WAIT:
            self._apply_when_due()
        else:
            self._act(self._agreed())
        idle = not (self._migration.in_flight or self._migration.done)
        if self.stage is Stage.MIGRATE and idle and self._may_post:
            self._migration.post_round()
            if not self._config.overlap:
                self._migration.wait()
        self._advance()
        if self.stage in (Stage.SAMPLE, Stage.PLAN, Stage.RECEIVE) or self._migration.in_flight:
            self._post_agreement()
        # Last, because the threads that carry it would take the core from what is still to do here.
        self._migration.start_round()
        self._watch_for_stall()

    def _look_for_drift(self, since: int) -> None:
        """All ranks have the same look: plan early if the load is no longer what it was."""
        promised = float(self._drift.promised.mean())
        if not self._drift.too_much(self.present.values, self.present.tokens):
            return
        until = self._window.shorten(since, cut_short(self._config.window, self._window.fine))
        if until is None:
            return
        self._early, self._collect_until = True, until
        self.early_plans += 1
        if self._comm.rank == 0:
            logger.info(
                "PAR of the last steps is %.3f instead of %.3f: planning from the next %d steps",
                float(np.nanmean(self.present.values)), promised, until - since,
            )  # fmt: skip

    def drain(self) -> None:
        """Bring a round in flight to its end and give up the rest of the cycle.

        Collective: every rank calls it at the same boundary. Afterwards all slots are live and
        nothing reads or writes weights until the next migration.

        Raises:
            PeerLostError: as `boundary`.
        """
        self._draining, self._may_post = True, False
        try:
            if self._migration.in_flight:
                self._act(self._agreed())
            while self._migration.in_flight or self._migration.must_repair:
                if not self._migration.in_flight:
                    self._migration.post_round()
                self._end_in_this_step()
        finally:
            self._draining = False
        if self.stage is not Stage.COLLECT:
            self._begin()

    def carry_out(self, plan: Plan, rounds: Sequence[Round]) -> None:
        """Run all rounds of a plan that is not the planner's, now, and start collecting anew.

        Collective: every rank calls it at the same boundary, after `drain`, with the same plan.

        Raises:
            PeerLostError: as `boundary`.
        """
        self._begin()
        self._drift.planned(plan.predicted_par)
        self._enter(Stage.MIGRATE)
        self._may_post = True
        self._migration.begin(plan, rounds)
        if self._migration.done:
            self._end()
        while self.stage is Stage.MIGRATE:
            self._migration.post_round()
            self._end_in_this_step()

    def _end_in_this_step(self) -> None:
        """Wait for the round in flight, on all ranks."""
        self._migration.wait()
        self._advance()
        self._post_agreement()
        self._act(self._agreed())

    def _begin(self) -> None:
        """Start collecting."""
        self._enter(Stage.COLLECT)
        self._cycle += 1
        self._progress = 0
        self._plan_words = _UNKNOWN
        self._fault = _OK
        self._agreement: tuple[torch.Tensor, dist.Work | None] | None = None
        self._work: dist.Work | None = None
        self._buffer: torch.Tensor | None = None
        self._submitted = False
        self._early = False  # whether this plan does not wait for its time
        self._collect_until = self._config.collect_interval
        self._reply: ReceivedPlan | None = None
        self._window.start()
        self.present.start()

    def _enter(self, stage: Stage) -> None:
        self.stage = stage
        self._stage_start = self._position.step
        self.stalled = None

    @property
    def _waited(self) -> int:
        """Steps in this stage."""
        return self._position.step - self._stage_start

    def _watch_for_stall(self) -> None:
        """Say so, once, when a stage that others must end takes very long."""
        waited = self._waited
        if self.stage in (Stage.COLLECT, Stage.WAIT) or waited != self._stall_limit:
            return
        self.stalled = f"{self.stage.value} for {waited} steps"
        if self.stage is Stage.MIGRATE:
            self.stalled += f" (round {self._migration.round} of {len(self._migration.rounds)})"
        logger.warning("rank %d: balancing makes no progress: %s", self._comm.rank, self.stalled)

    # ---- agreement ----------------------------------------------------------------------------

    def _post_agreement(self) -> None:
        """Start telling the others what this rank has; read at the next boundary."""
        step = self._position.step
        values = torch.tensor([self._progress, self._plan_words, -self._fault, step, -step])
        work = dist.all_reduce(
            values, op=dist.ReduceOp.MIN, group=self._comm.control, async_op=True
        )
        self._agreement = (values, work)

    def _agreed(self) -> _Agreed:
        """The minimum over all ranks of what was posted at the last boundary."""
        if self._agreement is None:
            return _Agreed(0, _UNKNOWN, _OK)
        values, work = self._agreement
        self._agreement = None
        self._comm.wait_for(work, "the agreement between ranks")
        progress, plan_words, minus_fault, least, minus_most = values.tolist()
        if least != -minus_most:
            raise EPLBError(
                f"ranks have made different numbers of forwards ({least} to {-minus_most}); every "
                "rank must make every forward of a balanced model (with an empty batch if need be)"
            )
        return _Agreed(progress, plan_words, -minus_fault)

    def _act(self, agreed: _Agreed) -> None:
        """What all ranks now know: go on together."""
        if self.stage is Stage.SAMPLE and agreed.progress >= _SAMPLED:
            self._buffer = self._window.samples()
            self._work = dist.all_reduce(self._buffer, group=self._comm.control, async_op=True)
            self._enter(Stage.PLAN)
        elif self.stage is Stage.PLAN and agreed.plan_words != _UNKNOWN:
            self._receive_plan(agreed.plan_words)
        elif self.stage is Stage.RECEIVE and agreed.progress >= _HAVE_PLAN:
            if agreed.fault:
                self.plans_failed += 1
                if self._planner is not None:
                    self._planner.refuse(self._cycle, "a rank found its rounds wrong")
                self._begin()
            else:
                self._enter(Stage.WAIT)
                self._apply_when_due()
        elif self.stage is Stage.MIGRATE and agreed.progress > _ROUNDS + self._migration.round:
            self._end_round(agreed.fault)

    def _arrived(self) -> bool:
        """Whether the collective in ``_work`` has finished; raises if it failed."""
        if not self._comm.has_finished(self._work):
            return False
        self._comm.wait_for(self._work, self.stage.value)
        self._work = None
        return True

    def _advance(self) -> None:
        """This rank's own progress since the last boundary."""
        if self.stage is Stage.SAMPLE:
            if self._window.ready():
                self._progress = _SAMPLED
        elif self.stage is Stage.PLAN:
            self._advance_plan()
        elif self.stage is Stage.RECEIVE:
            if self._progress < _HAVE_PLAN and self._arrived():
                self._read_plan()
        elif self._migration.in_flight and self._progress <= _ROUNDS + self._migration.round:
            if self._migration.finished():
                self._fault = _OK if self._migration.verified() else _CHECKSUM_FAULT
                self._progress = _ROUNDS + self._migration.round + 1

    # ---- planning -----------------------------------------------------------------------------

    def _advance_plan(self) -> None:
        if not self._submitted:
            if not self._arrived():
                return
            self._submitted = True
            self._submit()
        if self._planner is None or self._plan_words != _UNKNOWN:
            return
        answer = self._planner.poll()
        if answer is None or answer.request_id not in (self._cycle, None):
            return  # nothing yet, or an answer to a cycle that was given up
        if isinstance(answer, ReceivedPlan):
            self._reply = answer
            self._plan_words = len(answer.words)
        else:
            logger.warning("no new plan: %s; serving goes on as it is", answer.cause)
            self._plan_words = _NO_PLAN

    def _submit(self) -> None:
        """Every rank measures PAR from the summed load; rank 0 asks its planner."""
        assert self._buffer is not None
        load, rank_load = split_samples(self._buffer, self._num_experts)
        if self._config.dispatch_kind.shares_tokens:
            # Every rank counted the same tokens.
            load, rank_load = load // self._comm.num_ranks, rank_load // self._comm.num_ranks
        recorded = load.sum(axis=(1, 2)) > 0
        if not recorded.any():
            self._plan_words = _NOTHING_RECORDED
            return
        if recorded[1:].any():
            recorded[0] = False  # before the window
        self.par_measured = par(rank_load[recorded]).mean(axis=0)
        self.present.take(rank_load[recorded][-self._window.samples_per_length :].sum(axis=0))
        self.window_load = (load.sum(axis=0), rank_load.sum(axis=0))
        if self._planner is not None:
            self._planner.submit(self._cycle, load[recorded], self._migration.placement)

    def _receive_plan(self, num_words: int) -> None:
        """All ranks know that there is a plan, and how long it is; or that there is none."""
        if num_words < 0:
            self.plans_failed += num_words == _NO_PLAN
            self._begin()
            return
        if self._reply is None:
            self._buffer = torch.zeros(num_words, dtype=torch.int64)
        else:
            self._buffer = torch.from_numpy(self._reply.words)
        source = self._comm.global_ranks[0]
        self._work = dist.broadcast(self._buffer, source, group=self._comm.control, async_op=True)
        self._enter(Stage.RECEIVE)

    def _read_plan(self) -> None:
        """Read the plan that has arrived, some of its rounds at each boundary."""
        assert self._buffer is not None
        try:
            if self._reply is None:
                self._reply = decode_plan(
                    self._buffer.numpy(), self._migration.placement, self._bounds
                )
            if self._reply.schedule.start != self._migration.placement:
                raise ValueError("its rounds start from another placement than the present one")
            checked = sum(1 for _ in islice(self._reply.unchecked, _CHECKED_AT_ONCE))
            if checked == _CHECKED_AT_ONCE:
                return
        except ValueError as error:
            reason = str(error)  # a log record with the error itself would keep the model alive
            logger.error("rank %d cannot use the plan it got: %s", self._comm.rank, reason)
            self._fault = _PLAN_FAULT
        else:
            self.plan_seconds += self._reply.plan_seconds
        self._progress = _HAVE_PLAN

    # ---- migration ----------------------------------------------------------------------------

    def _apply_when_due(self) -> None:
        due = self._window_end + self._config.plan_interval
        if self._position.step < due and not self._early:
            return
        assert self._reply is not None
        plan, schedule = self._reply.plan, self._reply.schedule
        self.par_predicted = plan.predicted_par
        if self._config.record_map_path is not None:
            if self._write_map is not None:
                self._write_map(schedule.target)
            self._begin()
            return
        self._drift.planned(plan.predicted_par)
        self._enter(Stage.MIGRATE)
        self._migration.begin(plan, schedule.rounds)
        if self._migration.done:
            self._end()

    def _end_round(self, fault: int) -> None:
        """Every rank has finished the round: commit it, or, where one doubts it, drop it."""
        migration = self._migration
        self._enter(Stage.MIGRATE)
        if fault or migration.replaced:
            self._abandon("failed its checksums" if fault else "met experts that were cast")
            if not migration.must_repair:
                self._begin()
            return
        migration.commit(post_next=self._may_post)
        if migration.done or self._draining:
            self._end()

    def _abandon(self, why: str) -> None:
        """Some rank received what its peer did not send, or all of them where nobody looks now."""
        migration = self._migration
        if migration.repairing and not migration.replaced:
            migration.give_up()
            self._give_up("received experts failed their checksums twice in a row")
            return
        self.abandoned += 1
        logger.warning(
            "round %d %s; the rebalance is abandoned, serving goes on", migration.round, why
        )
        migration.abandon()
        self._fault, self._progress = _OK, _ROUNDS + migration.round

    def _end(self) -> None:
        migration = self._migration
        if self._reply is not None and not migration.repairing:
            self.rebalances += 1
            self.rebalanced_at = time.monotonic()
            if self._comm.rank == 0:
                rounds = migration.rounds[: migration.round]
                logger.info(
                    "rebalance %d at step %d: PAR %.3f measured, %.3f predicted; %d experts moved "
                    "in %d rounds; planned in %.0f ms",
                    self.rebalances,
                    self._position.step,
                    float(np.nanmean(self.par_measured)),
                    float(np.nanmean(self.par_predicted)),
                    sum(map(len, rounds)),
                    len(rounds),
                    1e3 * self._reply.plan_seconds,
                )
        self._begin()


@dataclass(frozen=True)
class _Agreed:
    """The minimum over ranks of what each of them has."""

    progress: int
    plan_words: int
    fault: int
