"""One life in the soak test: wrapped models on one group, traffic, events and ends, at random."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.life_wrapped import Company, Wrapped
from support.versions import UNSORTED

import torch_eplb

GROUPS = {
    "the world": [[0, 1, 2, 3]],
    "side by side": [[0, 1], [2, 3]],
    "interleaved": [[0, 2], [3, 1]],
}
"""Ranks of the groups that live at the same time, each its own life."""


class OwnError(Exception):
    """Raised in the model's forward."""


def make_groups(rank: int) -> dict[str, tuple[int, dist.ProcessGroup]]:
    """This rank's group of each kind, and which of them it is. Collective over the world."""
    found = {}
    for kind, members in GROUPS.items():
        for number, ranks in enumerate(members):
            group = dist.new_group(ranks, **UNSORTED)
            if rank in ranks:
                found[kind] = number, group
    return found


class Life:
    """One or two models, wrapped under random arguments, and what happens to them.

    Args:
        groups: what `make_groups` has made.
        seed: of what is the same on all ranks.
        counts: what happened is added here; sums over ranks tell how often.
    """

    def __init__(
        self,
        groups: dict[str, tuple[int, dist.ProcessGroup]],
        seed: str,
        counts: Counter[str],
    ) -> None:
        common = random.Random(seed)
        self.kind = common.choice(["the world", "the world", "side by side", "interleaved"])
        number, group = groups[self.kind]
        rank = dist.get_rank(group)
        seed = f"{seed} in group {number}"
        chance, own = random.Random(seed), random.Random(f"{seed} on rank {rank}")
        self.inference = chance.random() < 0.4
        gradients = ["none", "inputs", "experts"] if not self.inference else ["none"]
        self.company = Company(
            *(group, rank, group.size(), chance, own, counts), gradients=chance.choice(gradients)
        )
        self.step = -1
        self.models: list[Wrapped] = []
        for _ in range(chance.choice([1, 1, 2])):
            self.models.append(Wrapped(self.company))
        self.company.count(f"lives of {len(self.models)} models", len(self.models) > 1)
        self.company.count(f"lives on groups {self.kind}".replace("groups the", "the"))
        self.company.count("lives")

    def __repr__(self) -> str:
        gradients, inference = self.company.gradients, self.inference
        about = f"step {self.step}, group {self.kind}, {gradients=}, {inference=}"
        return "\n".join([about, *map(repr, self.models)])

    def live(self) -> None:
        """From the first step to the end of the wrappers."""
        chance = self.company.chance
        with torch.inference_mode(self.inference), torch.no_grad():  # not the other way round
            for step in range(chance.randint(20, 80)):
                self.step = step
                for event, probability in EVENTS:
                    if chance.random() < probability:
                        event(self, chance.choice(self.models))
                self.serve()
            for model in self.models:
                model.check_slots()
            for model in self.models:
                model.finish(self.step)

    def serve(self) -> None:
        """Each model in turn; the first, a draft say, up to three times."""
        first, *others = self.models
        for _ in range(self.company.chance.randint(1, 3) if others else 1):
            first.forward(self.step)
        for other in others:
            other.forward(self.step)

    # ---- events: on a model, chosen alike on all ranks ----------------------------------------

    def _somebody(self) -> bool:
        """Whether this rank is the one that was drawn."""
        return self.company.chance.randrange(self.company.size) == self.company.rank

    def straggle(self, model: Wrapped) -> None:
        if self._somebody():
            time.sleep(0.02)
            self.company.counts["fault: a rank was late"] += 1

    def strike_planner(self, model: Wrapped) -> None:
        number = self.company.chance.choice([signal.SIGKILL, signal.SIGSTOP])
        planner = model.balancer.engine._planner
        if planner is not None and planner.pid is not None:
            os.kill(planner.pid, number)
            self.company.counts[f"fault: planner {number.name}"] += 1

    def arm_corruption(self, model: Wrapped) -> None:
        if self._somebody() and model.options["verify"]:
            model.corrupt = True

    def raise_on_all(self, model: Wrapped) -> None:
        chance, layers = self.company.chance, model.balancer.module.layers
        layer = chance.choice(list(layers))
        self._raise_in(chance.choice([layers[0], layer.router, layer.experts]), model)
        self.company.count("fault: exception on all ranks")

    def raise_on_one(self, model: Wrapped) -> None:
        """Before any exchange the next call must be the retry; later all ranks find together."""
        if model.options["dispatch"] != "all_to_all":
            return
        layers = model.balancer.module.layers
        here, index = self._somebody(), self.company.chance.randrange(len(layers))
        if here:
            self._raise_in(layers[index].router, model)
        if index > 0:
            with pytest.raises(torch_eplb.EPLBError, match="not in the same forward"):
                model.try_forward(self.step)
        else:
            model.forward(self.step)
        self.company.count("fault: exception on one rank")

    def _raise_in(self, module: torch.nn.Module, model: Wrapped) -> None:
        def fail(*_: Any) -> None:
            raise OwnError

        handle = module.register_forward_pre_hook(fail)
        try:
            with pytest.raises(OwnError):
                model.try_forward(self.step)
        finally:
            handle.remove()
        model.check_commit()

    def be_in_different_models(self, model: Wrapped) -> None:
        """One rank in another model than the others: all are told, and nothing has happened."""
        if len(self.models) < 2 or not all(each.communicates for each in self.models):
            return
        batches = [each.batch(self.step) for each in self.models]
        which = int(self._somebody())
        with pytest.raises(torch_eplb.EPLBError, match="different models"):
            self.models[which].call(batches[which].x, batches[which].kept)
        for each in self.models:
            each.forward(self.step)
        self.company.count("fault: ranks in different models")

    def load_weights(self, model: Wrapped) -> None:
        model.load_weights()

    def save_weights(self, model: Wrapped) -> None:
        model.save_weights()


EVENTS: list[tuple[Callable[[Life, Wrapped], None], float]] = [
    (Life.straggle, 0.03),
    (Life.strike_planner, 0.007),
    (Life.arm_corruption, 0.02),
    (Life.raise_on_all, 0.03),
    (Life.raise_on_one, 0.03),
    (Life.be_in_different_models, 0.03),
    (Life.load_weights, 0.01),
    (Life.save_weights, 0.01),
]
