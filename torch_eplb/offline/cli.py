"""The command line: ``python -m torch_eplb simulate | plan | plot | convert | watch | report``.

Results go to stdout, progress and errors to stderr. Wrong input is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from torch_eplb.exporters.jsonl import read_snapshots
from torch_eplb.files.engines import PLAIN_KINDS
from torch_eplb.files.expert_map import write_expert_map
from torch_eplb.files.paths import atomic_write, check_target
from torch_eplb.files.trace import read_load, read_trace, window_samples
from torch_eplb.offline.convert import TARGETS, Options, convert
from torch_eplb.offline.cost import HARDWARE, CostModel
from torch_eplb.offline.page import page, runs_of
from torch_eplb.offline.progress import progress_bar
from torch_eplb.offline.replay import NO_BALANCING, Settings
from torch_eplb.offline.serving import Cycle
from torch_eplb.offline.simulate import simulate
from torch_eplb.offline.watch import watch
from torch_eplb.policies.registry import POLICIES, check_plan, make_policy
from torch_eplb.policies.split import even_split, par, rank_loads
from torch_eplb.values.choices import REPLICA_CHOICES
from torch_eplb.values.placement import Placement
from torch_eplb.values.sizes import parse_bytes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0, or 2 for wrong input.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has left. Python would complain once more at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        print(f"torch_eplb {arguments.command}: error: {message}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"torch_eplb {arguments.command}: error: out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_eplb", description="Expert-parallel load balancing, offline."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "simulate", help="replay a recorded trace against policies, and compare them"
    )
    command.add_argument("trace", metavar="TRACE", help="npz trace, as record_path= writes it")
    _add_replay_options(command)
    command.add_argument("--json", metavar="OUT", help="write the numbers to this JSON file")
    command.set_defaults(run=_simulate)

    command = commands.add_parser("plan", help="plan a static placement, as an expert map")
    command.add_argument(
        "load",
        metavar="LOAD.npz",
        help="trace, or npz file with load [layers, experts] or [samples, layers, experts]",
    )
    _add_group_options(command, default_ranks=None)
    command.add_argument("--out", required=True, metavar="MAP.json", help="file to write")
    command.add_argument("--policy", choices=POLICIES, default="flow", help="default: flow")
    command.add_argument(
        "--replica-choice",
        choices=REPLICA_CHOICES,
        default="even",
        help="how the server will split tokens over replicas; default: even",
    )
    command.add_argument(
        "--first-layer", type=int, default=0, metavar="ID", help="layer id of the first MoE layer"
    )
    command.set_defaults(run=_plan)

    command = commands.add_parser("plot", help="draw load and PAR as a picture")
    command.add_argument("source", metavar="TRACE|STATS", help="npz trace, or JSON of simulate")
    command.add_argument("--out", required=True, metavar="FILE.png", help="file to write")
    _add_replay_options(command)
    command.set_defaults(run=_plot)

    command = commands.add_parser(
        "convert", help="other engines' recorded loads and expert maps to ours, and back"
    )
    _add_convert_options(command)
    command.set_defaults(run=_convert)

    command = commands.add_parser("watch", help="a running balancer as a live table")
    command.add_argument(
        "source", metavar="URL|FILE", help="Prometheus endpoint, or file of JSON lines"
    )
    command.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds; 2")
    command.add_argument("--once", action="store_true", help="draw once and stop")
    command.set_defaults(run=_watch)

    command = commands.add_parser("report", help="a run's JSON lines as one HTML page")
    command.add_argument("stats", nargs="+", metavar="STATS.jsonl", help="a file per rank")
    command.add_argument("--out", required=True, metavar="PAGE.html", help="file to write")
    command.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE",
        help="only snapshots with this label, where files hold several balancers",
    )  # fmt: skip
    command.set_defaults(run=_report)
    return parser


def _add_convert_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="the files of one recording, or a map")
    add("--out", required=True, metavar="FILE", help="file to write")
    add("--to", choices=TARGETS, help="format to write; default: by the name of FILE")
    add(
        "--as", dest="plain", choices=PLAIN_KINDS, default="load",
        help="what an array without a name holds: load by expert, load by slot (needs --map), or "
        "a map; default: load",
    )  # fmt: skip
    add("--map", metavar="MAP", help="the map under which load by slot was counted")
    add("--ranks", type=int, metavar="R", help="ranks of a map that does not say")
    add("--experts", type=int, metavar="E", help="logical experts, if the last ones got no tokens")
    add("--layers", type=int, metavar="L", help="all layers of the model, for a map for SGLang")
    add("--first-layer", type=int, default=0, metavar="ID", help="drop layers before this one")
    add("--scale", type=float, metavar="F", help="multiply load by F and round to whole tokens")
    add("--drop-empty-layers", action="store_true", help="drop layers without load")


def _add_group_options(command: argparse.ArgumentParser, default_ranks: int | None) -> None:
    add = command.add_argument
    note = "" if default_ranks is None else f"; default: {default_ranks}"
    add(
        "--ranks",
        type=int,
        required=default_ranks is None,
        default=default_ranks,
        metavar="R",
        help=f"ranks of the expert-parallel group{note}",
    )
    add("--redundant", type=int, default=0, metavar="N", help="redundant experts per layer")
    add("--nodes", type=int, default=1, metavar="N", help="nodes that the ranks sit on")
    add("--groups", type=int, default=1, metavar="N", help="expert groups of the router")
    add("--min-gain", type=float, metavar="G", help="least PAR gained per moved expert (flow)")
    add("--target-par", type=float, metavar="P", help="nothing moves below this PAR")
    add("--max-moves", type=int, metavar="N", help="most experts moved per layer and plan (flow)")
    add("--plan-seconds", type=float, metavar="S", help="seconds after which a search ends (flow)")


def _add_replay_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_group_options(command, default_ranks=8)
    add(
        "--policy", nargs="+", action="extend", choices=(*POLICIES, NO_BALANCING), metavar="NAME",
        help=f"any of {', '.join(POLICIES)}; default: flow",
    )  # fmt: skip
    add(
        "--replica-choice", nargs="+", action="extend", choices=REPLICA_CHOICES, metavar="HOW",
        help=f"any of {', '.join(REPLICA_CHOICES)}; default: batch",
    )  # fmt: skip
    add("--window", type=int, default=50, metavar="N", help="steps a plan looks at; default: 50")
    add("--interval", type=int, default=50, metavar="N", help="steps between plans; default: 50")
    add("--steps", type=int, metavar="N", help="replay the first N steps only")
    add("--layers", type=int, metavar="N", help="replay N layers, repeating those of the trace")
    cycle = command.add_argument_group("a server's cycle, instead of --interval")
    add = cycle.add_argument
    add("--cycle", action="store_true", help="plan when a server would; any of these implies it")
    add("--collect-interval", type=int, metavar="N", help="steps of a collection, at most; 600")
    add("--plan-interval", type=int, metavar="N", help="steps before which no plan applies; 50")
    add("--replan-above", type=float, metavar="F", help="plan early above it; 1.05, inf: never")
    add("--plan-steps", type=int, metavar="N", help="steps that planning takes; 10")
    cost = command.add_argument_group("cost model, for bytes and step times")
    add = cost.add_argument
    add("--hardware", choices=HARDWARE, default="ascend-910c", help="default: ascend-910c")
    add("--expert-bytes", default="36MiB", metavar="SIZE", help="bytes of an expert; 36MiB")
    add("--flops-per-token", type=float, metavar="F", help="of one expert; as many as bytes")
    add("--tflops", type=float, metavar="T", help="peak rate of a rank, instead of the hardware's")
    add("--gbytes-per-s", type=float, metavar="B", help="link of a rank, instead of the hardware's")
    add("--staging-experts", type=int, default=1, metavar="N", help="staging of a rank; 1")


def _settings(arguments: argparse.Namespace) -> Settings:
    hardware = HARDWARE[arguments.hardware]
    changes: dict[str, Any] = {}
    if arguments.tflops is not None:
        changes.update(flops_per_second=arguments.tflops * 1e12)
    if arguments.gbytes_per_s is not None:
        changes.update(link_bytes_per_second=arguments.gbytes_per_s * 1e9)
    if changes:
        source = f"given on the command line: {', '.join(changes)}; else {hardware.source}"
        hardware = dataclasses.replace(hardware, source=source, **changes)
    size = parse_bytes(_number(arguments.expert_bytes), "--expert-bytes")
    flops = size if arguments.flops_per_token is None else arguments.flops_per_token
    return Settings(
        num_ranks=arguments.ranks,
        num_redundant_experts=arguments.redundant,
        num_nodes=arguments.nodes,
        num_expert_groups=arguments.groups,
        window=arguments.window,
        interval=arguments.interval,
        min_gain=arguments.min_gain,
        target_par=arguments.target_par,
        max_moves=arguments.max_moves,
        plan_seconds=arguments.plan_seconds,
        cycle=_cycle(arguments),
        staging_experts=arguments.staging_experts,
        cost=CostModel(hardware, size, float(flops)),
    )


def _cycle(arguments: argparse.Namespace) -> Cycle | None:
    """When plans are made, if a server is replayed."""
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Cycle)
        if getattr(arguments, field.name) is not None
    }
    if given.get("replan_above") == math.inf:
        given["replan_above"] = None
    return Cycle(**given) if given or arguments.cycle else None


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _replayed(arguments: argparse.Namespace, path: str) -> dict[str, Any]:
    settings = _settings(arguments)
    with progress_bar() as progress:
        document = simulate(
            read_trace(path),
            settings,
            arguments.policy or ["flow"],
            arguments.replica_choice or ["batch"],
            num_steps=arguments.steps,
            num_layers=arguments.layers,
            progress=progress,
        )
    document["trace"]["name"] = os.path.basename(path)
    return document


def _simulate(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        check_target(arguments.json, "JSON")
    document = _replayed(arguments, arguments.trace)
    # The file first: a closed pipe (| head) ends the program when it prints.
    if arguments.json is not None:
        with atomic_write(arguments.json, "JSON") as file:
            file.write(json.dumps(document).encode())
    print(format_table(document))


def format_table(document: dict[str, Any]) -> str:
    """A simulation as text: a table with a row per policy, and what its numbers mean."""
    settings, trace = document["settings"], document["trace"]
    header = ("policy", "replicas", "PAR mean", "p95", "max", "slots changed", "MB moved",
              "rounds", "plan ms", "step ms")  # fmt: skip
    rows = [header, *(_row(entry) for entry in document["policies"].values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    steps = (
        f"steps {settings['window']} to {trace['steps'] - 1} of {trace.get('name', 'the trace')}"
    )
    notes = (
        f"{steps}, {trace['layers']} layers x {trace['experts']} experts, {settings['num_ranks']} "
        f"ranks, {settings['num_redundant_experts']} redundant experts; a plan every "
        f"{settings['interval']} steps from the {settings['window']} before, judged on the steps "
        "after it. Slots changed: per layer and plan. MB moved, rounds: per plan, all layers, "
        f"experts of {settings['expert_bytes'] / 1e6:.1f} MB. Step ms: experts' computation and "
        f"the step's share of migration, estimated for {settings['hardware_source']}."
    )
    lines += ["", *textwrap.wrap(notes, 100)]
    for label, entry in document["policies"].items():
        if entry["refusals"]:
            step, cause = entry["refusals"][0]
            lines.append(
                f"{label}: {len(entry['refusals'])} plans dropped, at step {step}: {cause}"
            )
    return "\n".join(lines)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        entry["policy"],
        entry["replica_choice"],
        f"{entry['par_mean']:.4f}",
        f"{entry['par_p95']:.3f}",
        f"{entry['par_max']:.3f}",
        f"{entry['moves_per_layer_per_rebalance']:.2f} of {entry['slots_per_layer']}",
        f"{entry['bytes_per_rebalance'] / 1e6:,.0f}",
        f"{entry['rounds_per_rebalance']:.1f}",
        f"{entry['plan_ms_median']:.1f}",
        f"{entry['step_ms']:.3f}",
    )


def _plan(arguments: argparse.Namespace) -> None:
    settings = Settings(
        num_ranks=arguments.ranks,
        num_redundant_experts=arguments.redundant,
        num_nodes=arguments.nodes,
        num_expert_groups=arguments.groups,
    )
    if arguments.first_layer < 0:
        raise ValueError(f"--first-layer must not be negative, got {arguments.first_layer}")
    check_target(arguments.out, "expert map")
    load = window_samples(read_load(arguments.load), settings.max_samples)
    _, layers, experts = load.shape
    current = Placement.initial(layers, experts, settings.num_ranks, settings.slots(experts))
    knobs = ("min_gain", "target_par", "max_moves", "plan_seconds")
    options = {name: getattr(arguments, name) for name in knobs}
    policy = make_policy(
        arguments.policy,
        replica_choice=arguments.replica_choice,
        **{name: value for name, value in options.items() if value is not None},
    )
    plan = check_plan(
        policy(load, current, settings.topology()),
        load,
        current,
        settings.topology(),
        arguments.replica_choice,
    )
    write_expert_map(
        arguments.out,
        plan.placement,
        range(arguments.first_layer, arguments.first_layer + layers),
    )
    before = par(rank_loads(load, current, even_split(current))).mean()
    print(
        f"{arguments.out}: {layers} layers x {settings.num_ranks} ranks x "
        f"{plan.placement.num_slots} slots; mean PAR on this load {before:.3f} before, "
        f"{plan.predicted_par.mean():.3f} with this map ({arguments.replica_choice} split)"
    )


def _plot(arguments: argparse.Namespace) -> None:
    # Imported here, so that the other commands do without; matplotlib is loaded later still.
    from torch_eplb.offline.plot import plot_simulation, read_simulation

    check_target(arguments.out, "picture")
    if _is_zip(arguments.source):
        document = _replayed(arguments, arguments.source)
    else:
        document = read_simulation(arguments.source)
    plot_simulation(document, arguments.out)
    print(arguments.out)


def _is_zip(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _convert(arguments: argparse.Namespace) -> None:
    options = Options(
        target=arguments.to,
        plain=arguments.plain,
        map_path=arguments.map,
        num_ranks=arguments.ranks,
        num_experts=arguments.experts,
        num_layers=arguments.layers,
        first_layer=arguments.first_layer,
        scale=arguments.scale,
        drop_empty_layers=arguments.drop_empty_layers,
    )
    print(convert(arguments.sources, arguments.out, options))


def _watch(arguments: argparse.Namespace) -> None:
    watch(arguments.source, interval=arguments.interval, once=arguments.once)


def _report(arguments: argparse.Namespace) -> None:
    check_target(arguments.out, "page")
    snapshots = [taken for path in arguments.stats for taken in read_snapshots(path)]
    text = page(runs_of(snapshots, arguments.label))
    with atomic_write(arguments.out, "page") as file:
        file.write(text.encode())
    print(arguments.out)
