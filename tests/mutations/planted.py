"""Faults that somebody could make, and the tests that must notice them.

Every entry is a text that stands once in a file of the package, what a careless change would make
of it, and the tests that fail then: whole files, or single tests where a file takes long.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["FAULTS", "ROOT", "Fault", "fault"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: says what is wrong with it.
        file: below the package.
        before, after: the text that is replaced, and by what.
        tests: what pytest is asked to run.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def plant(self, tree: Path) -> None:
        """Write the fault into a copy of the tree.

        Raises:
            ValueError: the text does not stand there exactly once.
        """
        path = tree / "torch_eplb" / self.file
        text = path.read_text()
        if text.count(self.before) != 1:
            raise ValueError(
                f"fault {self.name!r}: its text stands {text.count(self.before)} times in "
                f"{self.file}, not once; describe it anew in tests/mutations/planted.py"
            )
        path.write_text(text.replace(self.before, self.after))


def fault(name: str, file: str, before: str, after: str, *tests: str) -> Fault:
    return Fault(name, file, before, after, tuple(f"tests/{test}" for test in tests))


FAULTS = (
    # ---- comm ---------------------------------------------------------------------------------
    fault(
        "transfers-not-waited-for",
        "comm/transport.py",
        "        if all(completed):",
        "        if True:",
        "comm",
    ),
    fault(
        "transfers-not-ordered-before-the-commit",
        "comm/transport.py",
        "        for work in self._works:\n            work.wait()",
        "        pass",
        "comm",
    ),
    fault(
        "tokens-on-a-device-waited-for-by-the-host",
        "comm/communicator.py",
        '        if self.device.type == "cpu":\n            self.wait_for(work, what)',
        "        if True:\n            self.wait_for(work, what)",
        "comm",
    ),
    fault(
        "no-warm-up",
        "comm/communicator.py",
        "        self._warm_up()\n",
        "",
        "comm",
    ),
    fault(
        "peers-by-rank-in-the-group",
        "comm/communicator.py",
        "return dist.P2POp(dist.isend, tensor, self.global_ranks[peer], self.data)",
        "return dist.P2POp(dist.isend, tensor, peer, self.data)",
        "distributed/test_groups.py",
    ),
    fault(
        "incidents-not-told",
        "comm/loss.py",
        'self._store.add("incidents", 1)',
        "pass",
        "faults/test_rank_faults.py::test_all_survivors_notice_a_death_at_once_and_name_the_dead_only",
    ),
    fault(
        "whoever-noticed-is-lost",
        "comm/loss.py",
        "        gone -= alive\n",
        "",
        "faults/test_rank_faults.py",
    ),
    fault(
        "settings-not-compared",
        "comm/agreement.py",
        "    if differing:",
        "    if False:",
        "distributed/test_wrap.py",
    ),
    fault(
        "errors-of-others-unheard",
        "comm/agreement.py",
        "    if failed:",
        "    if False:",
        "distributed/test_wrap.py",
        "distributed/test_writers.py",
    ),
    fault(
        "forks-communicate",
        "comm/communicator.py",
        "        return os.getpid() != self._owner",
        "        return False",
        "faults/test_lives.py::test_a_forked_process_is_refused_at_once_and_its_parent_goes_on",
    ),
    # ---- runtime ------------------------------------------------------------------------------
    fault(
        "no-check-of-equal-steps",
        "runtime/cycle.py",
        "        if least != -minus_most:",
        "        if False:",
        "runtime/test_cycle.py",
    ),
    fault(
        "a-doubted-round-is-committed",
        "runtime/cycle.py",
        "if fault or migration.replaced:",
        "if migration.replaced:",
        "faults/test_balancing_goes_wrong.py",
    ),
    fault(
        "a-round-is-committed-where-nobody-looks-any-more",
        "runtime/cycle.py",
        "if fault or migration.replaced:",
        "if fault:",
        "distributed/test_company.py",
    ),
    fault(
        "experts-that-have-grown-are-received-all-the-same",
        "runtime/engine.py",
        "self.exchange.require_room(layer)",
        "pass",
        "distributed/test_company.py",
    ),
    fault(
        "zero-compute-experts-add-nothing",
        "layers/computing.py",
        "summed_TH = summed_TH + identity",
        "pass",
        "distributed/test_kinds_of_experts.py",
    ),
    fault(
        "replicas-in-a-list-are-one-tensor",
        "layers/slots.py",
        "                if expert in used or entry.is_inference():",
        "                if entry.is_inference():",
        "layers/test_slots.py",
    ),
    fault(
        "entries-of-lists-may-share-memory",
        "layers/refusals.py",
        "        if span[0] == last[0] and span[1] < last[2] and (",
        "        if span[0] == last[0] and span[1] < 0 and (",
        "layers/test_slots.py",
    ),
    fault(
        "the-sentinel-is-never-asked-for-again",
        "layers/spec.py",
        'return implementation not in ("eager", None)',
        "return True",
        "distributed/test_kinds_of_experts.py",
    ),
    fault(
        "a-round-is-committed-when-one-rank-has-it",
        "runtime/cycle.py",
        "values, op=dist.ReduceOp.MIN, group",
        "values, op=dist.ReduceOp.MAX, group",
        "distributed/test_slow_ranks.py",
        "distributed/test_outputs.py",
    ),
    fault(
        "plans-applied-at-once",
        "runtime/cycle.py",
        "        if self._position.step < due and not self._early:\n            return\n",
        "",
        "runtime/test_cycle.py",
    ),
    fault(
        "load-of-before-the-drift-planned-for",
        "routing/load.py",
        "        self._first = steps_since_start\n",
        "",
        "routing/test_load.py",
    ),
    fault(
        "promise-that-was-not-kept-asked-for-again",
        "policies/drift.py",
        "        if self._first_look:\n",
        "        if False:\n",
        "runtime/test_early_plans.py",
    ),
    fault(
        "shared-tokens-counted-by-every-rank",
        "runtime/cycle.py",
        "        if self._config.dispatch_kind.shares_tokens:\n"
        "            # Every rank counted the same tokens.",
        "        if False:\n            # Every rank counted the same tokens.",
        "distributed/test_counting.py",
    ),
    fault(
        "repair-forgotten-when-draining",
        "runtime/cycle.py",
        "while self._migration.in_flight or self._migration.must_repair:",
        "while self._migration.in_flight:",
        "faults/test_balancing_goes_wrong.py",
    ),
    fault(
        "steps-in-a-recomputation",
        "runtime/engine.py",
        "        elif not recomputing():",
        "        else:",
        "distributed/test_counting.py",
    ),
    # ---- layers -------------------------------------------------------------------------------
    fault(
        "positions-not-compared",
        "layers/all_to_all.py",
        "        context.position.compare(counts[:, -1].tolist())",
        "        pass",
        "faults/test_exceptions.py",
    ),
    fault(
        "gradients-of-weights-lost",
        "layers/journey.py",
        "        grad_QK[found.flat_C] = grad_C",
        "        grad_QK[found.flat_C] = grad_C * 0.5",
        "distributed/test_dispatch.py",
    ),
    fault(
        "one-row-per-choice",
        "layers/journey.py",
        "        others = sum(send) - send[self._comm.rank]",
        "        others = self._rows.row_TK.numel()",
        "distributed/test_outputs.py",
    ),
    fault(
        "recomputations-counted",
        "layers/hooks.py",
        "        if not recomputing():",
        "        if True:",
        "distributed/test_counting.py",
    ),
    fault(
        "rows-outside-of-the-mask-counted",
        "layers/hooks.py",
        "        outside = ~counted_T.unsqueeze(1)",
        "        outside = (counted_T & ~counted_T).unsqueeze(1)",
        "distributed/test_counting.py",
    ),
    fault(
        "narrow-physical-ids",
        "layers/external.py",
        "        if torch.iinfo(dtype).max >= largest:\n            return",
        "        if True:\n            return",
        "distributed/test_ids.py",
    ),
    fault(
        "two-models-of-a-group-meet",
        "layers/roster.py",
        "        if len(self._models) < 2:",
        "        if True:",
        "distributed/test_several_models.py",
    ),
    # ---- routing ------------------------------------------------------------------------------
    fault(
        "host-table-of-a-device-not-updated",
        "routing/tables.py",
        "            self._write(self.host_slots_LEM, index, slots)",
        "            pass",
        "routing",
    ),
    fault(
        "solver-table-not-updated",
        "routing/tables.py",
        "            self._write(self.solver_LEM, index, renamed)",
        "            pass",
        "routing/test_tables.py",
        "routing/test_choose.py",
    ),
    fault(
        "arrivals-counted-for-the-expert-before",
        "routing/tables.py",
        "            self._write(self.experts_LS, index, held.astype(np.int64))",
        "            pass",
        "distributed/test_token_counts.py",
    ),
    fault(
        "stale-token-counts",
        "layers/external.py",
        "        if stale and name not in module._buffers:",
        "        if False:",
        "layers/test_token_counts.py",
    ),
    fault(
        "drained-slots-get-tokens",
        "routing/tables.py",
        "            position, physical, expert = position[kept], physical[kept], expert[kept]",
        "            pass",
        "routing/test_tables.py",
    ),
    fault(
        "narrow-arithmetic",
        "routing/ids.py",
        "    ids_TK = ids_TK.long()\n    if not on_host(ids_TK):",
        "    if not on_host(ids_TK):",
        "routing/test_ids.py",
    ),
    fault(
        "ids-out-of-bounds-on-a-device",
        "routing/ids.py",
        "ids_TK.clamp(max=num_experts).masked_fill(ids_TK < 0, num_experts)",
        "ids_TK.masked_fill(ids_TK < 0, num_experts)",
        "routing/test_ids.py",
    ),
    fault(
        "counts-when-not-recording",
        "routing/load.py",
        "            counters.addcmul_(counts, self.recording)",
        "            counters.add_(counts)",
        "distributed/test_wrap.py",
    ),
    fault(
        "samples-are-levels",
        "routing/load.py",
        "        return stacked[1:] - stacked[:-1]",
        "        return stacked[1:]",
        "runtime",
        "distributed/test_exporting.py",
        "distributed/test_wrap.py",
    ),
    fault(
        "table-choice-by-rank",
        "routing/tables.py",
        "(self.rank * _RANK_PHASE if self.prefer_local else 0.0)",
        "self.rank * _RANK_PHASE",
        "routing/test_tables.py",
        "distributed/test_dispatch.py",
    ),
    fault(
        "nodes-ignored",
        "routing/tables.py",
        "        near = node == self.rank // per_node",
        "        near = node >= 0",
        "distributed/test_nodes.py",
        "routing/test_tables.py",
    ),
    fault(
        "all-sources-break-ties-alike",
        "routing/tables.py",
        "    place = np.random.default_rng(rank).permutation(num_ranks)",
        "    place = np.arange(num_ranks)",
        "routing",
    ),
    fault(
        "offsets-of-sources-ignored",
        "routing/choose.py",
        "    first = offset_E.unsqueeze(1)",
        "    first = 0 * offset_E.unsqueeze(1)",
        "routing/test_choose.py",
    ),
    fault(
        "weights-cost-nothing",
        "layers/all_to_all.py",
        "            tables.weight_tokens,\n",
        "            0,\n",
        "distributed/test_cost.py",
    ),
    fault(
        "small-experts-split",
        "routing/costs.py",
        "    if counts_E.max(initial=0) <= weight_tokens:",
        "    if False:",
        "routing/test_costs.py",
    ),
    fault(
        "the-costliest-rank-is-not-relieved",
        "routing/costs.py",
        "relieve(_one_replica_each(counts_E, layout), layout, weight_tokens, enough)",
        "_one_replica_each(counts_E, layout)",
        "routing/test_costs.py",
    ),
    fault(
        "ranks-have-homes-of-their-own",
        "routing/tables.py",
        "np.argsort(np.where(slots_EM < 0, np.iinfo(np.int64).max, slots_EM), axis=1)",
        'np.argsort(slots_EM < 0, axis=1, kind="stable")',
        "routing/test_tables.py",
    ),
    # ---- migration ----------------------------------------------------------------------------
    fault(
        "sums-not-compared",
        "migration/exchange.py",
        "checks = [expected == checksum(tensors) for expected, tensors in self._received_sums]",
        "checks = [expected == expected for expected, tensors in self._received_sums]",
        "distributed/test_migration.py",
    ),
    fault(
        "sums-blind-to-places",
        "migration/exchange.py",
        "(sums * place).sum()",
        "sums.sum()",
        "distributed/test_migration.py",
    ),
    fault(
        "staged-experts-not-written",
        "migration/exchange.py",
        "                write_bytes(slot, landing)",
        "                pass",
        "distributed/test_migration.py",
    ),
    fault(
        "autograd-not-told",
        "migration/exchange.py",
        "            torch.autograd.graph.increment_version(tensor)",
        "            pass",
        "distributed/test_versions.py",
    ),
    fault(
        "routes-after-the-next-forward",
        "migration/progress.py",
        "        self._update_tables(changed)",
        "        pass",
        "distributed/test_outputs.py",
    ),
    fault(
        "drained-slots-stay-in-use",
        "migration/progress.py",
        "        self._update_tables(self._drain(transfers))",
        "        self._drain(transfers)",
        "distributed/test_outputs.py",
        "distributed/test_migration.py",
        "runtime",
    ),
    fault(
        "destroyed-slots-not-repaired",
        "migration/progress.py",
        "        self.repairing = bool(rows)",
        "        self.repairing, rows = False, []",
        "faults/test_balancing_goes_wrong.py",
        "distributed/test_migration.py",
    ),
    # ---- compiled graphs ----------------------------------------------------------------------
    fault(
        "graphs-write-old-tables-back",
        "runtime/clock.py",
        "            passed.copy_(own)",
        "            pass",
        "test_compile.py::test_compiled_outputs_are_the_plain_models",
    ),
    fault(
        "hooks-are-compiled-by-themselves",
        "layers/graphs.py",
        "        return disabled(*args, **kwargs)",
        "        return hook(*args, **kwargs)",
        "test_compile.py::test_compiled_outputs_are_the_plain_models",
    ),
    fault(
        "compiled-code-outlives-wrapping",
        "layers/graphs.py",
        "        torch.compiler.reset()",
        "        pass",
        "test_compile.py::test_a_model_that_ran_compiled_before_it_was_wrapped_runs_the_hooks",
    ),
    fault(
        "forwards-without-hooks-unnoticed",
        "layers/position.py",
        "            self._unseen += 1",
        "            pass",
        "test_compile.py::test_forwards_that_run_no_hook_of_a_layer_are_noticed",
    ),
    fault(
        "entries-without-steps-unnoticed",
        "layers/position.py",
        "        self.entries += 1",
        "        self.entries = 1",
        "test_compile.py::test_layers_that_are_entered_without_a_step_are_noticed",
    ),
    fault(
        "autocast-keeps-old-experts",
        "migration/exchange.py",
        "        torch.clear_autocast_cache()",
        "        pass",
        "test_compile.py::test_autocast_keeps_no_casts_of_experts_that_moved",
    ),
    # ---- schedule, planner, policies ----------------------------------------------------------
    fault(
        "sends-unbounded",
        "schedule/layer_moves.py",
        "        return self._send_bytes is None or not sent or sent + size <= self._send_bytes",
        "        return True",
        "schedule",
    ),
    fault(
        "far-sources-as-good-as-near-ones",
        "schedule/layer_moves.py",
        "            source // self._node_size != target // self._node_size,",
        "            False,",
        "schedule",
    ),
    fault(
        "last-copies-are-drained",
        "schedule/layer_moves.py",
        "            self._free[rank].remove(slot)\n            self._last_copies",
        "            self._last_copies",
        "schedule",
    ),
    fault(
        "posted-with-what-checkpoints-hold",
        "runtime/engine.py",
        "with without_saved_tensors_hooks(), self._failing():",
        "with self._failing():",
        "faults/test_lives.py::test_a_model_that_was_recomputed_as_a_whole_can_be_dropped",
    ),
    # ---- state --------------------------------------------------------------------------------
    fault(
        "lists-are-loaded-by-slot",
        "state/full.py",
        "        if keys[0] in full:",
        "        if False:",
        "distributed/test_listed_experts.py::test_state_of_lists_is_logical_or_refused",
    ),
    fault(
        "lists-are-saved-by-slot",
        "state/full.py",
        "(keys.of(e), part.slot(e))",
        "(keys.of(e), part.slot(0))",
        "distributed/test_listed_experts.py::test_state_of_lists_is_logical_or_refused",
    ),
    fault(
        "experts-that-are-held-one-by-one-are-loaded-by-slot",
        "state/pretrained.py",
        "for slot, here in held if here == expert]",
        "for slot, here in held if slot == expert]",
        "distributed/test_listed_experts.py",
    ),
    fault(
        "choices-that-switch-has-dropped-go-to-the-first-expert",
        "layers/known.py",
        "ids_NK.masked_fill(chosen_NK == 0, PADDING)",
        "ids_NK",
        "distributed/test_module_experts.py",
    ),
    fault(
        "modules-may-differ-in-what-is-no-tensor",
        "layers/submodules.py",
        "        if str(one) != str(first):",
        "        if False:",
        "distributed/test_module_experts.py",
    ),
    fault(
        "aliases-gathered-twice",
        "state/full.py",
        "            if id(value) not in gathered:",
        "            if True:",
        "distributed/test_full_state.py::test_experts_with_two_names_are_gathered_once_and_stay_one_tensor",
    ),
    fault(
        "state-loaded-into-moving-experts",
        "state/full.py",
        "        engine.settle()\n    rest",
        "        pass\n    rest",
        "distributed/test_full_state.py",
    ),
    fault(
        "the-experts-of-other-balancers-of-the-model-are-forgotten",
        "state/wrapped.py",
        "    return [balancer.engine, *others]",
        "    return [balancer.engine]",
        "distributed/test_several_models.py",
    ),
    fault(
        "a-model-may-save-itself-when-one-of-its-balancers-has-gone",
        "runtime/guards.py",
        "            if not self._refusal.guards:",
        "            if True:",
        "distributed/test_several_models.py",
    ),
    fault(
        "all-rows-of-llama-4-are-padded-as-those-of-the-first-slot",
        "layers/known.py",
        "        most * slots_C - begin_S[slots_C]",
        "        most * slots_C - begin_S[0]",
        "distributed/test_forms.py",
    ),
    fault(
        "every-part-of-a-chunked-tensor-is-its-first",
        "state/pretrained.py",
        "            entries = slice(index * target[0], (index + 1) * target[0])",
        "            entries = slice(0, target[0])",
        "state/test_conversions.py",
    ),
    fault(
        "layers-that-were-not-chosen-are-balanced",
        "layers/finding.py",
        "return [name for name in found if any(_is_named(name, pattern) for pattern in choice)]",
        "return list(found)",
        "layers/test_experts.py",
    ),
)
