"""Migration schedules: rounds and transfers against the least possible, and the time it takes.

    python examples/benchmarks/schedule.py                 # 1,000 pairs, some minutes
    python examples/benchmarks/schedule.py --quick         # 60 pairs, some seconds

Each pair is a placement that is live and one that is wanted, on 8 to 320 ranks with 64 to 512
experts, 0 to 100% redundancy and 1 to 8 layers; four kinds of pairs take turns:

    reshuffle  two unrelated random placements
    partial    1% to 50% of the slots swap experts or replicas at random
    repacked   a recorded trace, packed greedily from nothing for two different windows of it
    refined    packed for one window, then the hottest ranks swap experts for a later one

Every schedule is checked (`check_schedule`). Reported over all pairs, with staging for one expert:

    rounds     rounds / max over ranks of ceil(receives / budget). With direct receives it may fall
               below 1, because those take no staging.
    transfers  messages / experts newly held by a rank, which no schedule can undercut
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.trace import read_trace
from torch_eplb.schedule.schedule import (
    SOURCE_RANK,
    TARGET_RANK,
    check_schedule,
    make_schedule,
)
from torch_eplb.values.placement import Placement

RANKS = (8, 16, 32, 64, 128, 256, 320)
EXPERTS = (64, 128, 256, 512)
MODES: dict[str, dict[str, Any]] = {
    "staged only": {"direct": False},
    "direct (default)": {"direct": True},
}
ROUNDS_BAR, TRANSFERS_BAR, SECONDS_BAR = 1.25, 1.05, 2.0


class Shape(NamedTuple):
    """Of one layer."""

    ranks: int
    slots: int
    experts: int


class Pair(NamedTuple):
    kind: str
    current: Placement
    wanted: Placement


class Result(NamedTuple):
    rounds: float
    transfers: float
    direct: float
    seconds: float
    check_seconds: float


def random_layer(rng: np.random.Generator, shape: Shape) -> NDArray[np.int32]:
    """``[ranks, slots]``: random numbers of replicas on random ranks, none twice on a rank."""
    while True:
        counts = np.ones(shape.experts, dtype=np.int64)
        for expert in rng.integers(shape.experts, size=shape.ranks * shape.slots - shape.experts):
            counts[expert if counts[expert] < shape.ranks else int(counts.argmin())] += 1
        room = np.full(shape.ranks, shape.slots)
        layer = np.empty((shape.ranks, shape.slots), dtype=np.int32)
        for expert in np.argsort(-counts, kind="stable"):
            chosen = np.argsort(-room - rng.random(shape.ranks))[: counts[expert]]
            if not room[chosen].all():
                break
            room[chosen] -= 1
            layer[chosen, room[chosen]] = expert
        else:
            return rng.permutation(shape.experts).astype(np.int32)[layer]


def disturbed(
    rng: np.random.Generator, layer: NDArray[np.int32], share: float
) -> NDArray[np.int32]:
    """``layer`` with a share of its slots changed: swaps, and redundant slots given to others."""
    layer = layer.copy()
    ranks, slots = layer.shape
    counts = np.bincount(layer.reshape(-1))
    for _ in range(max(1, int(share * layer.size))):
        (r, q), (s, t) = rng.integers(ranks, size=2), rng.integers(slots, size=2)
        mine, other = layer[r, s], layer[q, t]
        if other in layer[r]:
            continue
        if counts[mine] > 1 and rng.random() < 0.5:
            layer[r, s] = other
            counts[mine] -= 1
            counts[other] += 1
        elif mine not in layer[q]:
            layer[r, s], layer[q, t] = other, mine
    return layer


def packed_layer(load: NDArray[np.float64], shape: Shape) -> NDArray[np.int32]:
    """``[ranks, slots]``: hot experts get replicas, the heaviest replica goes to the lightest rank.

    Args:
        load: ``[experts]``, tokens.
        shape: of the layer.
    """
    counts = np.ones(shape.experts, dtype=np.int64)
    for _ in range(shape.ranks * shape.slots - shape.experts):
        heat = np.where(counts < shape.ranks, load / counts, -1.0)
        counts[int(heat.argmax())] += 1
    ranks: list[list[int]] = [[] for _ in range(shape.ranks)]
    weight = np.zeros(shape.ranks)
    for expert in np.argsort(-load / counts, kind="stable").tolist():
        for _ in range(counts[expert]):
            open_ranks = [r for r in range(shape.ranks) if len(ranks[r]) < shape.slots]
            fitting = [r for r in open_ranks if expert not in ranks[r]]
            if fitting:
                rank = min(fitting, key=weight.__getitem__)
            else:
                rank = _make_room(ranks, open_ranks[0], expert)
            ranks[rank].append(expert)
            weight[rank] += load[expert] / counts[expert]
    return np.array(ranks, dtype=np.int32)


def _make_room(ranks: list[list[int]], open_rank: int, expert: int) -> int:
    """Move some expert to ``open_rank`` from a rank without ``expert``; that rank is returned."""
    for rank, held in enumerate(ranks):
        movable = [e for e in held if e not in ranks[open_rank]]
        if expert not in held and movable:
            held.remove(movable[0])
            ranks[open_rank].append(movable[0])
            return rank
    raise RuntimeError(f"no rank can take another replica of expert {expert}")


def refined_layer(
    layer: NDArray[np.int32], load: NDArray[np.float64], swaps: int
) -> NDArray[np.int32]:
    """``layer`` after at most so many swaps between its hottest and its coldest rank."""
    layer = layer.copy()
    share = load / np.bincount(layer.reshape(-1), minlength=len(load))
    for _ in range(swaps):
        weight = share[layer].sum(axis=1)
        hot, cold = int(weight.argmax()), int(weight.argmin())
        gain = share[layer[hot]][:, None] - share[layer[cold]][None, :]
        gain[np.isin(layer[hot], layer[cold])] = 0
        gain[:, np.isin(layer[cold], layer[hot])] = 0
        gain[gain >= weight[hot] - weight[cold]] = 0  # would only trade places
        if gain.max() <= 0:
            break
        s, t = np.unravel_index(int(gain.argmax()), gain.shape)
        layer[hot, s], layer[cold, t] = layer[cold, t], layer[hot, s]
    return layer


def windows(
    rng: np.random.Generator, load: NDArray[np.int64], num_layers: int, num_experts: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Load of two windows of a trace, each ``[layers, experts]``.

    Models with more experts than the trace has get several of its layers, side by side.

    Args:
        rng: the source of choices.
        load: ``[steps, layers, experts]``.
        num_layers: layers wanted.
        num_experts: experts wanted.
    """
    steps, recorded_layers, recorded_experts = load.shape
    joined = -(-num_experts // recorded_experts)
    chosen = rng.integers(recorded_layers, size=(num_layers, joined))
    length = max(1, min(50, steps // 4))
    first, second = np.sort(rng.integers(steps - length, size=2))
    a, b = (
        load[start : start + length].sum(axis=0)[chosen].reshape(num_layers, -1)[:, :num_experts]
        for start in (first, second)
    )
    return a + 1.0, b + 1.0


def random_shape(rng: np.random.Generator) -> Shape:
    """Any shape with at most 100% redundancy, and with none in one case of four."""
    while True:
        ranks, experts = int(rng.choice(RANKS)), int(rng.choice(EXPERTS))
        least, most = -(-experts // ranks), 2 * experts // ranks
        slots = least if rng.random() < 0.25 else int(rng.integers(least, max(least, most) + 1))
        if experts <= ranks * slots <= 2 * experts:
            return Shape(ranks, slots, experts)


def make_pairs(seed: int, count: int, load: NDArray[np.int64] | None) -> Iterator[Pair]:
    """The pairs; without a trace (``load`` is None) only the random kinds."""
    kinds = ("reshuffle", "partial", "repacked", "refined")[: 4 if load is not None else 2]
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        kind = kinds[number % len(kinds)]
        shape, num_layers = random_shape(rng), int(rng.integers(1, 9))
        if kind == "reshuffle":
            a, b = ([random_layer(rng, shape) for _ in range(num_layers)] for _ in range(2))
        elif kind == "partial":
            a = [random_layer(rng, shape) for _ in range(num_layers)]
            share = float(np.exp(rng.uniform(np.log(0.01), np.log(0.5))))
            b = [disturbed(rng, layer, share) for layer in a]
        else:
            assert load is not None
            before, after = windows(rng, load, num_layers, shape.experts)
            a = [packed_layer(row, shape) for row in before]
            if kind == "repacked":
                b = [packed_layer(row, shape) for row in after]
            else:
                swaps = int(rng.integers(1, shape.ranks + 1))
                b = [refined_layer(x, row, swaps) for x, row in zip(a, after, strict=True)]
        yield Pair(kind, *(Placement(np.stack(x), shape.experts) for x in (a, b)))


def measure(pair: Pair, **bounds: Any) -> Result | None:
    """Schedule a pair with staging for one expert; None where nothing moves."""
    begin = time.perf_counter()
    schedule = make_schedule(pair.current, pair.wanted, expert_bytes=1, staging_bytes=1, **bounds)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    check_schedule(schedule, expert_bytes=1, staging_bytes=1)
    check_seconds = time.perf_counter() - begin
    receives = (pair.current.experts != schedule.target.experts).sum(axis=(0, 2))
    if not receives.any():
        return None
    moves = np.concatenate([rnd.transfers for rnd in schedule.rounds])
    messages = int((moves[:, SOURCE_RANK] != moves[:, TARGET_RANK]).sum())
    direct = sum(int(rnd.direct.sum()) for rnd in schedule.rounds)
    return Result(
        rounds=len(schedule.rounds) / int(receives.max()),
        transfers=messages / int(pair.current.newly_held(pair.wanted).sum()),
        direct=direct / len(moves),
        seconds=seconds,
        check_seconds=check_seconds,
    )


def reshuffle_seconds(slots: int, **bounds: Any) -> Result:
    """58 layers of 256 experts on 32 ranks, fully reshuffled; the fastest of three runs."""
    rng = np.random.default_rng(58)
    shape = Shape(32, slots, 256)
    pair = Pair(
        "full",
        *(Placement(np.stack([random_layer(rng, shape) for _ in range(58)]), 256) for _ in "ab"),
    )
    runs = [result for _ in range(3) if (result := measure(pair, **bounds)) is not None]
    return min(runs, key=lambda result: result.seconds)


def line(name: str, values: list[float], pattern: str = "{:.3f}") -> str:
    numbers = (np.mean(values), np.percentile(values, 95), np.max(values))
    return f"{name:<44}" + "".join(f"{pattern.format(number):>10}" for number in numbers)


def report(results: dict[str, list[tuple[Pair, Result]]]) -> bool:
    """Print the table; whether the averages meet their bars."""
    print(f"{'':<44}{'mean':>10}{'p95':>10}{'max':>10}")
    met = True
    groups: dict[str, Callable[[Pair], bool]] = {
        "no redundancy": lambda pair: not pair.current.num_redundant_experts,
        "with redundancy": lambda pair: bool(pair.current.num_redundant_experts),
    }
    for mode, rows in results.items():
        kinds = dict.fromkeys(pair.kind for pair, _ in rows)
        print(f"\n{mode}, {len(rows)} pairs")
        rounds = [result.rounds for _, result in rows]
        print(line("  rounds / least", rounds))
        for name, belongs in groups.items():
            if part := [result.rounds for pair, result in rows if belongs(pair)]:
                print(line(f"    {name} ({len(part)})", part))
        for kind in kinds:
            part = [result.rounds for pair, result in rows if pair.kind == kind]
            print(line(f"    {kind} ({len(part)})", part))
        transfers = [result.transfers for _, result in rows]
        print(line("  transfers / least", transfers))
        print(line("  share received directly", [result.direct for _, result in rows]))
        print(line("  make_schedule, ms", [1e3 * r.seconds for _, r in rows], "{:.1f}"))
        print(line("  check_schedule, ms", [1e3 * r.check_seconds for _, r in rows], "{:.1f}"))
        met &= float(np.mean(rounds)) <= ROUNDS_BAR and max(transfers) <= TRANSFERS_BAR
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=1000, help="pairs to schedule")
    parser.add_argument("--quick", action="store_true", help="60 pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trace",
        type=Path,
        default=Path(__file__).parents[1] / "data" / "trace.npz",
        help="recorded trace for half of the pairs",
    )
    options = parser.parse_args()
    load = None
    if options.trace.exists():
        load = read_trace(options.trace).counts.sum(axis=1, dtype=np.int64)
    else:
        print(f"no trace at {options.trace}: random pairs only\n")

    results: dict[str, list[tuple[Pair, Result]]] = {mode: [] for mode in MODES}
    for pair in make_pairs(options.seed, 60 if options.quick else options.pairs, load):
        for mode, bounds in MODES.items():
            if (result := measure(pair, **bounds)) is not None:
                results[mode].append((pair, result))
    met = report(results)

    print("\n58 layers x 256 experts x 32 ranks, fully reshuffled")
    for slots in (8, 9, 16):
        for mode, bounds in MODES.items():
            result = reshuffle_seconds(slots, **bounds)
            met &= result.seconds <= SECONDS_BAR
            print(
                f"  {slots} slots a rank, {mode}: {result.seconds:.2f} s "
                f"(check {result.check_seconds:.2f} s), rounds / least {result.rounds:.3f}"
            )
    print(
        f"\nbars (mean rounds <= {ROUNDS_BAR}, transfers <= {TRANSFERS_BAR}, "
        f"full reshuffle <= {SECONDS_BAR} s): {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
