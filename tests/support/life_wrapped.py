"""One wrapped model of a life in the soak test, and the unwrapped one that it is compared with."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from support.life_models import (
    HIDDEN,
    TOP_K,
    Model,
    PaddedExperts,
    PhysicalExperts,
    SentinelExperts,
)
from support.models import skewed_batch
from support.moving import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_eplb
from torch_eplb.policies.registry import POLICIES

CHOICES = {
    "all_to_all": ["batch", "local", "table", "even"],
    "all_gather": ["batch", "table", "even"],
    "all_reduce": ["batch", "table", "even"],
    "external": ["local", "table", "even"],
}
# Experts of a model by the dtype of its ids. An entry's place in a choice table, expert * 120 +
# turn, fits in none of the narrow ones.
IDS = {torch.int64: 8, torch.int32: 8, torch.uint8: 8, torch.int16: 288}


@dataclass(frozen=True)
class Company:
    """The ranks that a life is lived on.

    Attributes:
        group: their process group.
        rank, size: this rank's number in it, and how many there are.
        chance: draws the same on all of them.
        own: draws for this rank alone.
        counts: of this rank; what all ranks do alike is counted by the first.
        gradients: "none", "inputs" (experts are frozen, and may move) or "experts" (they stay).
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    chance: random.Random
    own: random.Random
    counts: Counter[str]
    gradients: str

    def count(self, what: str, times: int = 1) -> None:
        """Count what all ranks do alike."""
        if self.rank == 0:
            self.counts[what] += times


@dataclass
class Batch:
    """Rows ``x [T, HIDDEN]``; ``kept [T, TOP_K]`` or None, and ``tokens [T]`` or None."""

    x: torch.Tensor
    kept: torch.Tensor | None
    tokens: torch.Tensor | None


class Wrapped:
    """A model under random arguments, perhaps inside DDP or recomputed."""

    def __init__(self, company: Company) -> None:
        self.company, chance = company, company.chance
        self.dtype = chance.choice([*IDS, torch.int64, torch.int64])
        self.drops = self.dtype.is_signed and chance.random() < 0.3
        self.masks = chance.random() < 0.3
        self.experts = PaddedExperts
        self.num_layers = chance.randint(1, 3)
        self.options = self._draw_options()
        if self.options["dispatch"] == "all_reduce" and chance.random() < 0.5:
            self.experts = SentinelExperts
        model = self.fresh_model()
        self._adopt(copy.deepcopy(model))
        if self.options["dispatch"] == "external":
            for layer in model.layers:
                layer.experts.__class__ = PhysicalExperts
                layer.experts.group = company.group
        self.balancer = torch_eplb.wrap(model, company.group, **self.options)
        if self.balancer.engine._planner is not None:
            self.balancer.engine._planner._timeout = 3.0
        if company.gradients == "inputs":
            for parameter in self.balancer.expert_parameters():
                parameter.requires_grad_(False)
        self.ddp = chance.choice(["", "", "", "balancer", "module"])
        self.call: Callable[..., torch.Tensor] = self.balancer
        if self.ddp:
            inside = self.balancer if self.ddp == "balancer" else model
            self.call = nn.parallel.DistributedDataParallel(inside, process_group=company.group)
        self.recomputes = ""
        if company.gradients != "none":
            whole = [] if self.ddp else ["whole", "whole, reentrant"]
            self.recomputes = chance.choice(["", "layers", *whole])
        model.recomputes = self.recomputes == "layers"
        self.version = self.corrupted = 0
        self.corrupt = self.called = False
        self._let_transfers_be_corrupted()
        for what, holds in (
            ("with narrow ids", self.dtype in (torch.int16, torch.uint8)),
            ("with dropped choices", self.drops),
            ("with token masks", self.masks),
            ("inside DDP", bool(self.ddp)),
            ("recomputed", bool(self.recomputes)),
        ):
            company.count(f"models {what}", holds)

    def fresh_model(self) -> Model:
        seed = self.company.chance.randrange(1000)
        return Model(self.num_layers, IDS[self.dtype], self.dtype, self.experts, seed)

    def _draw_options(self) -> dict[str, Any]:
        chance, num_experts = self.company.chance, IDS[self.dtype]
        # Elements of one expert of `Experts` of width 4, a float of scale included.
        expert_bytes = 4 * (8 * HIDDEN + 4 * HIDDEN + HIDDEN + 1)
        unit = expert_bytes * num_experts // 8
        dispatch = chance.choice(
            ["all_to_all", "all_to_all", "all_gather", "all_reduce", "external"]
        )
        bound = chance.choice([None, 1, 3])
        trains = self.company.gradients == "experts"
        policy = chance.choice([*sorted(POLICIES), "random", "random", "random"])
        redundant = self.company.size * chance.randint(0, 3)
        return {
            "dispatch": dispatch,
            "replica_choice": chance.choice(CHOICES[dispatch]),
            "max_tokens_per_rank": chance.choice([None, 256]) if dispatch == "all_gather" else None,
            "cost": chance.choice([None, None, (30.0, 1.0)]),
            "num_redundant_experts": 0 if trains else redundant,
            "policy": "static" if trains else policy,
            "collect_interval": chance.randint(2, 6),
            "plan_interval": chance.randint(0, 3),
            "layers_per_step": chance.randint(1, 3),
            "staging_bytes": chance.randint(1, 4) * unit,
            "bytes_per_step": None if bound is None else bound * unit,
            "direct": chance.random() < 0.7,
            "overlap": chance.random() < 0.7,
            "verify": chance.random() < 0.6,
            "phase": chance.choice(["all", "all", "decode"]),
            "min_gain": 0.0,
            "timeout": 60,
        }

    def __repr__(self) -> str:
        return (
            f"{self.options}, {self.dtype}, drops={self.drops}, masks={self.masks}, "
            f"ddp={self.ddp!r}, recomputes={self.recomputes!r}, {self.experts.__name__}"
        )

    def _adopt(self, reference: Model) -> None:
        """Compare with this model from now on."""
        self.reference = reference
        self.chosen: list[torch.Tensor] = []  # ids of its last forward, by layer
        for layer in reference.layers:
            layer.experts.register_forward_pre_hook(lambda _, args: self.chosen.append(args[1]))

    @property
    def communicates(self) -> bool:
        return self.options["dispatch"] != "external"

    # ---- forwards -----------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """Tokens around a centre that drifts; own ones, or under all_reduce everybody's."""
        company = self.company
        dice = company.chance if self.options["dispatch"] == "all_reduce" else company.own
        size = dice.choice([0, 1, 5, 12])
        drift = 10 * (step // 40) + dice.randrange(3)
        if dice is company.own:
            drift += 1000 * company.rank
        x = skewed_batch(size, HIDDEN, drift, strength=3.0)
        generator = torch.Generator().manual_seed(dice.randrange(10**6))
        share = dice.choice([0.0, 0.5, 0.9, 1.0])
        kept = torch.rand(size, TOP_K, generator=generator) < share if self.drops else None
        masked = self.masks and dice.random() < 0.7
        tokens = torch.rand(size, generator=generator) < 0.6 if masked else None
        return Batch(x, kept, tokens)

    def try_forward(self, step: int) -> None:
        """A forward whose output is not looked at: it is to raise."""
        batch = self.batch(step)
        self.call(batch.x, batch.kept)

    def forward(self, step: int) -> None:
        """One forward, with a backward in lives that have gradients; everything is compared."""
        company, chance, batch = self.company, self.company.chance, self.batch(step)
        phase = chance.choice(["prefill", "decode", "decode", None])
        paused = chance.random() < 0.1
        before = self.balancer.load()
        with contextlib.ExitStack() as stack:
            if phase is not None:
                stack.enter_context(self.balancer.phase(phase))
            if paused:
                stack.enter_context(self.balancer.paused())
            if batch.tokens is not None:
                stack.enter_context(self.balancer.tokens(batch.tokens))
            if self._may_idle(batch):
                self.balancer.idle_step()
                company.counts["idle steps"] += 1
                batch.kept = batch.tokens = None
                output = batch.x
            elif company.gradients == "none":
                output = self.call(batch.x, batch.kept)
            else:
                with torch.enable_grad():
                    batch.x.requires_grad_()
                    output = self._run_to_differentiate(batch)
        if company.gradients == "none":
            self.chosen.clear()
            expected = self.reference(batch.x, batch.kept)
        else:
            expected = self._compare_gradients(batch, output)
        right = torch.allclose(output, expected, atol=1e-4, rtol=1e-3)
        company.counts["outputs compared"] += 1
        company.counts["wrong outputs"] += not right
        assert right, "a wrong output"
        if self.balancer.stats().stage != "closed":
            recorded = not paused and self.options["phase"] in ("all", phase)
            self._compare_load(before, batch, recorded)
        self.called = True
        company.count("steps paused", paused)
        company.count("steps")
        self.check_commit()

    def _may_idle(self, batch: Batch) -> bool:
        company = self.company
        can = self.options["dispatch"] in ("all_to_all", "all_gather")
        may = self.called and can and not len(batch.x)
        return may and company.gradients == "none" and company.own.random() < 0.5

    def _run_to_differentiate(self, batch: Batch) -> torch.Tensor:
        if self.recomputes.startswith("whole"):
            reentrant = self.recomputes.endswith("reentrant")
            return checkpoint(self.call, batch.x, batch.kept, use_reentrant=reentrant)
        return self.call(batch.x, batch.kept)

    def _compare_gradients(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """Backward on both models; returns the output of the reference."""
        company, shared = self.company, self.options["dispatch"] == "all_reduce"
        x = batch.x.detach().requires_grad_()
        with torch.enable_grad():
            output.square().sum().backward()
            self.chosen.clear()
            expected = self.reference(x, batch.kept)
            expected.square().sum().backward()
        pairs = [(batch.x.grad, x.grad)]
        held = self.balancer.placement.experts[:, company.rank]
        layers = zip(self.balancer.module.layers, self.reference.layers, held, strict=True)
        for layer, original, experts in layers:
            wanted = original.router.weight.grad
            if self.ddp:  # averages
                dist.all_reduce(wanted, group=company.group)
                wanted /= company.size
            pairs.append((layer.router.weight.grad, wanted))
            if company.gradients == "inputs" or not self.communicates:
                assert all(p.grad is None for p in layer.experts.parameters())
                continue
            for name, parameter in original.experts.named_parameters():
                wanted = _gradient(parameter)
                if not shared:  # experts get everybody's tokens
                    dist.all_reduce(wanted, group=company.group)
                pairs.append((_gradient(getattr(layer.experts, name)), wanted[experts.tolist()]))
        for actual, wanted in pairs:
            torch.testing.assert_close(actual, wanted, atol=1e-2, rtol=1e-3)
        company.counts["gradients compared"] += len(pairs)
        for model in (self.balancer.module, self.reference):
            model.zero_grad(set_to_none=True)
        return expected.detach()

    def _compare_load(self, before: Any, batch: Batch, recorded: bool) -> None:
        """What this forward has added to the load is what its tokens chose."""
        num_experts = IDS[self.dtype]
        hits, sent = (now - then for now, then in zip(self.balancer.load(), before, strict=True))
        for layer, ids in enumerate(self.chosen):
            counted = ids.long() if batch.tokens is None else ids[batch.tokens].long()
            counted = counted[counted >= 0] if recorded else counted[:0]
            expected = torch.bincount(counted.reshape(-1), minlength=num_experts)
            if self.options["dispatch"] == "all_gather":  # every rank counts what it sees
                dist.all_reduce(expected, group=self.company.group)
            assert hits[layer].tolist() == expected.tolist(), "the load is not what was chosen"
            assert sent[layer].sum() == hits[layer].sum()

    # ---- weights ------------------------------------------------------------------------------

    def check_commit(self) -> None:
        version = self.balancer.stats().placement_version
        if version != self.version:
            self.version = version
            self.check_slots()
            self.company.count("commits checked")

    def check_slots(self) -> None:
        """Every live slot is its expert byte for byte, and only live slots get tokens."""
        migration, rank = self.balancer.engine._migration, self.company.rank
        for index, layer in enumerate(self.reference.layers):
            original = layer.experts.state_dict()
            now = self.balancer.module.layers[index].experts.state_dict()
            experts, live = migration.experts[index], migration.live[index]
            for slot in range(experts.shape[1]):
                if live[rank, slot]:
                    for name, tensor in now.items():
                        assert torch.equal(tensor[slot], original[name][experts[rank, slot]])
            for expert, slots in enumerate(self.balancer.engine._tables.slots_LEM[index].numpy()):
                used = slots[slots >= 0]
                assert len(used)
                assert live.reshape(-1)[used].all()
                assert (experts.reshape(-1)[used] == expert).all()

    def load_weights(self) -> None:
        fresh = self.fresh_model()
        in_flight = self.balancer.engine._migration.in_flight
        self.company.count("weight loads while a round was in flight", in_flight)
        self.balancer.load_state_dict(fresh.state_dict())
        self._adopt(fresh)
        self.check_slots()
        self.company.count("weight loads")

    def save_weights(self) -> None:
        assert_same(self.balancer.state_dict(), self.reference.state_dict())
        self.company.count("weights saved")

    def _let_transfers_be_corrupted(self) -> None:
        exchange, migration = self.balancer.engine.exchange, self.balancer.engine._migration
        verified: Callable[[], bool] = exchange.verified

        def damaged() -> bool:
            # Twice in a row, in the repair as well, would end balancing: that is tested elsewhere.
            if self.corrupt and exchange._received_sums and not migration.repairing:
                _, tensors = exchange._received_sums[0]
                with torch.inference_mode():
                    tensors[0][0] ^= 1
                self.corrupt = False
                self.corrupted += 1
                self.company.counts["fault: transfer corrupted"] += 1
            return verified()

        exchange.verified = damaged  # type: ignore[method-assign]

    # ---- how it ends --------------------------------------------------------------------------

    def finish(self, step: int) -> None:
        way = self.company.chance.choice(["close", "unwrap", "with", "drop"])
        balancer, model = self.balancer, self.balancer.module
        if way == "close":
            balancer.close()
            self.forward(step)
        elif way == "with":
            with balancer:
                self.forward(step)
        if way != "drop":
            unwrapped = balancer.unwrap()
            assert unwrapped is model
            if self.communicates:
                batch = self.batch(step)
                expected = self.reference(batch.x, batch.kept)
                assert torch.equal(unwrapped(batch.x, batch.kept), expected)
            assert_same(unwrapped.state_dict(), self.reference.state_dict())
        stats = balancer.stats()
        assert stats.disabled is None
        assert stats.stalled is None
        self.company.count("rebalances", stats.rebalances)
        self.company.count("experts moved", stats.experts_moved)
        self.company.count("plans failed", stats.plans_failed)
        self.company.count("rebalances abandoned", stats.rebalances_abandoned)
        self.company.counts["planner restarts"] += stats.planner_restarts
        self.company.count(f"ended by {way}")
        corrupted = torch.tensor([self.corrupted])
        dist.all_reduce(corrupted, group=self.company.group)
        if way != "drop":  # where a round may still be in flight
            assert bool(corrupted) == bool(stats.rebalances_abandoned)
        del balancer, model, self.balancer, self.call
        gc.collect()


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros where no gradient has come."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
