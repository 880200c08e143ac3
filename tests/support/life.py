"""One life of a wrapped model in the soak test: random configuration, traffic, events and end."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Experts, ToyModel, skewed_batch
from support.moving import assert_same

import torch_eplb
from torch_eplb.policies.registry import POLICIES

EXPERTS, HIDDEN = 8, 16
CHOICES = {
    "all_to_all": ["batch", "local", "table", "even"],
    "all_reduce": ["batch", "table", "even"],
    "external": ["local", "table", "even"],
}


class OwnError(Exception):
    """Raised in the model's forward."""


class PhysicalExperts(Experts):
    """Dispatches by itself: fetches all slots of all ranks, and computes by physical id."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        slots = {}
        for name in ("gate_up_proj", "down_proj", "down_bias", "scale"):
            mine = getattr(self, name).detach()
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, mine)
            slots[name] = torch.cat(everyone)
        return Experts.forward(SimpleNamespace(**slots), hidden_states, top_k_index, top_k_weights)


class Life:
    """A model, wrapped under a random configuration, and what happens to it.

    Args:
        rank, world_size: this rank and how many there are.
        seed: of what is the same on all ranks.
        counts: what happened is added here; keys that begin with "here: " are this rank's alone.
    """

    def __init__(self, rank: int, world_size: int, seed: str, counts: Counter[str]) -> None:
        self.rank, self.world_size, self.counts = rank, world_size, counts
        self.chance = random.Random(seed)
        self.own = random.Random(f"{seed} on rank {rank}")
        self.step = -1
        chance = self.chance
        model = ToyModel(chance.randint(1, 3), EXPERTS, HIDDEN, seed=chance.randrange(1000))
        self.reference = copy.deepcopy(model)
        self.options = self._draw_options(model)
        if self.options["dispatch"] == "external":
            for layer in model.layers:
                layer.experts.__class__ = PhysicalExperts
        self.balancer = torch_eplb.wrap(model, **self.options)
        if self.balancer.engine._planner is not None:
            self.balancer.engine._planner._timeout = 3.0
        self.version = 0
        self.corrupt = False
        self.corrupted = 0
        self._let_transfers_be_corrupted()

    def _draw_options(self, model: ToyModel) -> dict[str, Any]:
        chance = self.chance
        expert_bytes = sum(
            tensor[0].nbytes for tensor in model.layers[0].experts.state_dict().values()
        )
        dispatch = chance.choice(["all_to_all", "all_to_all", "all_reduce", "external"])
        bound = chance.choice([None, 1, 3])
        return {
            "dispatch": dispatch,
            "replica_choice": chance.choice(CHOICES[dispatch]),
            "num_redundant_experts": self.world_size * chance.randint(0, 3),
            "policy": chance.choice([*sorted(POLICIES), "random", "random", "random"]),
            "collect_interval": chance.randint(2, 6),
            "plan_interval": chance.randint(0, 3),
            "layers_per_step": chance.randint(1, 3),
            "staging_bytes": chance.randint(1, 4) * expert_bytes,
            "bytes_per_step": None if bound is None else bound * expert_bytes,
            "direct": chance.random() < 0.7,
            "overlap": chance.random() < 0.7,
            "verify": chance.random() < 0.6,
            "phase": chance.choice(["all", "all", "decode"]),
            "min_gain": 0.0,
            "timeout": 60,
        }

    def describe(self) -> str:
        return f"step {self.step}, {self.options}"

    # ---- what happens -------------------------------------------------------------------------

    def live(self) -> None:
        """From the first step to the end of the wrapper."""
        for step in range(self.chance.randint(30, 120)):
            self.step = step
            for event, probability in EVENTS:
                if self.chance.random() < probability:
                    event(self)
            self.forward()
            self.check_commit()
        self.check_slots()
        self.finish()

    def forward(self) -> None:
        x = self.batch()
        with contextlib.ExitStack() as stack:
            phase = self.chance.choice(["prefill", "decode", "decode", None])
            if phase is not None:
                stack.enter_context(self.balancer.phase(phase))
            if self.chance.random() < 0.1:
                stack.enter_context(self.balancer.paused())
                self.counts["steps paused"] += 1
            self.compare(self.balancer(x), x)
        self.counts["steps"] += 1

    def batch(self) -> torch.Tensor:
        """Tokens around a centre that drifts; own ones, or under all_reduce everybody's."""
        dice = self.chance if self.options["dispatch"] == "all_reduce" else self.own
        size = dice.choice([0, 1, 5, 12])
        drift = 10 * (self.step // 40) + dice.randrange(3)
        if dice is self.own:
            drift += 1000 * self.rank
        return skewed_batch(size, HIDDEN, drift, strength=3.0)

    def compare(self, output: torch.Tensor, x: torch.Tensor) -> None:
        right = torch.allclose(output, self.reference(x), atol=1e-4, rtol=1e-3)
        self.counts["here: outputs compared"] += 1
        self.counts["here: wrong outputs"] += not right
        assert right, "a wrong output"

    def check_commit(self) -> None:
        version = self.balancer.stats().placement_version
        if version != self.version:
            self.version = version
            self.check_slots()
            self.counts["commits checked"] += 1

    def check_slots(self) -> None:
        """Every live slot is its expert byte for byte, and only live slots get tokens."""
        migration = self.balancer.engine._migration
        for index, layer in enumerate(self.reference.layers):
            original = layer.experts.state_dict()
            now = self.balancer.module.layers[index].experts.state_dict()
            experts, live = migration.experts[index], migration.live[index]
            for slot in range(experts.shape[1]):
                if live[self.rank, slot]:
                    for name, tensor in now.items():
                        assert torch.equal(tensor[slot], original[name][experts[self.rank, slot]])
            for expert, slots in enumerate(self.balancer.engine._tables.slots_LEM[index].numpy()):
                used = slots[slots >= 0]
                assert len(used)
                assert live.reshape(-1)[used].all()
                assert (experts.reshape(-1)[used] == expert).all()

    # ---- how it ends --------------------------------------------------------------------------

    def finish(self) -> None:
        way = self.chance.choice(["close", "unwrap", "with", "drop"])
        balancer, model = self.balancer, self.balancer.module
        if way == "close":
            balancer.close()
            self.forward()
        elif way == "with":
            with balancer:
                self.forward()
        if way != "drop":
            unwrapped = balancer.unwrap()
            assert unwrapped is model
            if self.options["dispatch"] != "external":
                x = self.batch()
                assert torch.equal(unwrapped(x), self.reference(x))
            assert_same(unwrapped.state_dict(), self.reference.state_dict())
        stats = balancer.stats()
        assert stats.disabled is None
        assert stats.stalled is None
        self.counts["rebalances"] += stats.rebalances
        self.counts["experts moved"] += stats.experts_moved
        self.counts["plans failed"] += stats.plans_failed
        self.counts["rebalances abandoned"] += stats.rebalances_abandoned
        self.counts["here: planner restarts"] += stats.planner_restarts
        self.counts[f"ended by {way}"] += 1
        corrupted = torch.tensor([self.corrupted])
        dist.all_reduce(corrupted)
        if way != "drop":  # where a round may still be in flight
            assert bool(corrupted) == bool(stats.rebalances_abandoned)
        del balancer, model, self.balancer
        gc.collect()

    # ---- events -------------------------------------------------------------------------------

    def straggle(self) -> None:
        if self.chance.randrange(self.world_size) == self.rank:
            time.sleep(0.02)
            self.counts["here: fault: a rank was late"] += 1

    def strike_planner(self) -> None:
        number = self.chance.choice([signal.SIGKILL, signal.SIGSTOP])
        planner = self.balancer.engine._planner
        if planner is not None and planner.pid is not None:
            os.kill(planner.pid, number)
            self.counts[f"here: fault: planner {number.name}"] += 1

    def arm_corruption(self) -> None:
        if self.chance.randrange(self.world_size) == self.rank and self.options["verify"]:
            self.corrupt = True

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
                self.counts["here: fault: transfer corrupted"] += 1
            return verified()

        exchange.verified = damaged  # type: ignore[method-assign]

    def raise_on_all(self) -> None:
        layer = self.chance.choice(list(self.balancer.module.layers))
        module = self.chance.choice([self.balancer.module.layers[0], layer.router, layer.experts])
        self._raise_in(module)
        self.counts["fault: exception on all ranks"] += 1

    def raise_on_one(self) -> None:
        """Before any exchange the next call must be the retry; later all ranks find together."""
        if self.options["dispatch"] != "all_to_all":
            return
        here = self.chance.randrange(self.world_size) == self.rank
        layers = self.balancer.module.layers
        index = self.chance.randrange(len(layers))
        if here:
            self._raise_in(layers[index].router)
        if index > 0:
            with pytest.raises(torch_eplb.EPLBError, match="not in the same forward"):
                self.balancer(self.batch())
        else:
            self.forward()
        self.counts["fault: exception on one rank"] += 1

    def _raise_in(self, module: torch.nn.Module) -> None:
        def fail(*_: Any) -> None:
            raise OwnError

        handle = module.register_forward_pre_hook(fail)
        try:
            with pytest.raises(OwnError):
                self.balancer(self.batch())
        finally:
            handle.remove()
        self.check_commit()

    def load_weights(self) -> None:
        fresh = ToyModel(len(self.reference.layers), seed=self.chance.randrange(1000))
        self.counts["weight loads while a round was in flight"] += (
            self.balancer.engine._migration.in_flight
        )
        self.balancer.load_state_dict(fresh.state_dict())
        self.reference = fresh
        self.check_slots()
        self.counts["weight loads"] += 1

    def save_weights(self) -> None:
        assert_same(self.balancer.state_dict(), self.reference.state_dict())
        self.counts["weights saved"] += 1


EVENTS: list[tuple[Callable[[Life], None], float]] = [
    (Life.straggle, 0.03),
    (Life.strike_planner, 0.007),
    (Life.arm_corruption, 0.02),
    (Life.raise_on_all, 0.03),
    (Life.raise_on_one, 0.03),
    (Life.load_weights, 0.01),
    (Life.save_weights, 0.01),
]
