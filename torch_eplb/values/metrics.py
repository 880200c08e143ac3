"""What a user sees of a wrapped model: `Stats`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """State and totals of one rank since wrapping. Same on all ranks unless said otherwise.

    Attributes:
        step: forwards made. One that raised before it had exchanged anything and the next are one.
        stage: what the rebalance cycle is doing, in words.
        rebalances: plans that were carried out, those included that only changed the split.
        early_plans: plans that did not wait for ``collect_interval``, because the load had drifted.
        seconds_since_rebalance: since the last of them ended; None before the first one (per rank).
        placement_version: rounds committed; changes whenever an expert has moved.
        experts_moved: transfers of one expert in one layer.
        par_now: per layer, PAR over the last steps: ``collect_interval`` / 32 of them, and at least
            16 (in shorter windows the window's last). While a plan is made and experts move it is
            not renewed; NaN at first.
        par_measured: per layer, PAR over the last collection window; NaN before the first one.
        par_predicted: per layer, PAR that the last plan expected; NaN before the first one.
        bytes_sent, bytes_received: expert weights that this rank moved (per rank).
        token_rows_sent, token_bytes_sent: tokens on their way to other ranks' experts, and results
            on their way back, that this rank sent in its forwards (per rank; "all_to_all" only).
        active_experts: experts with tokens on the rank that has most of them, mean over the calls
            of all layers; None where ranks do not know each other's batches (all but "all_to_all"
            with "batch").
        staging_bytes: size of the staging pool.
        staging_bytes_peak: most of it that a round used (per rank).
        plan_seconds: time spent planning, in the planner.
        hook_seconds: time this rank's host spent at step boundaries: counting windows, agreement,
            transfers, commits. The layers' own dispatch is not in it (per rank).
        migration_seconds: the part of it at boundaries with experts to move: how long forwards
            waited for posting, receiving and committing. What a transfer takes from a forward that
            it runs beside (bandwidth, cores) is not in it (per rank).
        plans_failed: cycles that ended without a usable plan; the log says why.
        planner_restarts: how often the planner was started again (rank 0's).
        rebalances_abandoned: rebalances given up because a checksum did not match.
        writes_failed: loads and maps that could not be written to ``record_path`` and
            ``record_map_path`` (rank 0's).
        stalled: why nothing has progressed for long, or forwards and MoE layers do not go together;
            or None.
        disabled: why balancing is off for good, or None.
    """

    step: int
    stage: str
    rebalances: int
    early_plans: int
    seconds_since_rebalance: float | None
    placement_version: int
    experts_moved: int
    par_now: list[float]
    par_measured: list[float]
    par_predicted: list[float]
    bytes_sent: int
    bytes_received: int
    token_rows_sent: int
    token_bytes_sent: int
    active_experts: float | None
    staging_bytes: int
    staging_bytes_peak: int
    plan_seconds: float
    hook_seconds: float
    migration_seconds: float
    plans_failed: int
    planner_restarts: int
    rebalances_abandoned: int
    writes_failed: int
    stalled: str | None
    disabled: str | None

    def why_not(self) -> dict[str, str]:
        """What keeps the model from being balanced, by the attribute that says so."""
        reasons = {"stalled": self.stalled, "disabled": self.disabled}
        return {name: reason for name, reason in reasons.items() if reason is not None}
