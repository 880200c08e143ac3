"""Serves real text with a trained MoE model on 4 ranks while torch_eplb balances its experts.

    python examples/serve_moe.py                        # starts its own ranks, about two minutes
    torchrun --nproc-per-node 4 examples/serve_moe.py   # the same
    python examples/serve_moe.py --text ~/src ~/letters # your text; each path is one kind

The kinds of text drift, and change abruptly twice, so the experts that are hot change as well. What
the library needs is in `wrapped`; everything else here makes traffic, checks every claim against
an unwrapped copy of the model, and draws pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from _report import Checks, Display, History, draw, print_summary
from _text import builtin_streams, streams_of, windows
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

import torch_eplb

RANKS = 4
CHECKPOINT = Path(__file__).parent / "data" / "tiny_moe"


def main() -> None:
    args = parse_arguments()
    if "RANK" not in os.environ:
        start_ranks()
    disable_progress_bar()
    dist.init_process_group("gloo")
    try:
        equal = run(args)
    finally:
        dist.destroy_process_group()
    sys.exit(0 if equal else 1)


def run(args: argparse.Namespace) -> bool:
    """Serves, reports on rank 0, and returns whether all greedy tokens were as they must be."""
    text = args.streams or builtin_streams(held_out=True, limit=200_000)
    reference = load_model()
    begin = time.perf_counter()
    with wrapped(load_model(), args) as balancer:
        history, checks = serve(balancer, reference, text, args)
        seconds = time.perf_counter() - begin
        stats = [balancer.stats()] * RANKS
        dist.all_gather_object(stats, stats[0])
        checks = checks.over_ranks()
    if dist.get_rank() == 0:
        print_summary(history, stats, checks, seconds)
        for picture in draw(history, args.out):
            print(f"wrote {picture}")
    return checks.different_tokens == 0


def wrapped(model: PreTrainedModel, args: argparse.Namespace) -> torch_eplb.ExpertLoadBalancer:
    return torch_eplb.wrap(
        model,
        num_redundant_experts=args.redundant,
        collect_interval=args.collect,  # steps whose load a plan is made from
        plan_interval=4,  # steps that the planner gets before its plan is applied
        layers_per_step=1,  # layers that change in one step
    )


def serve(
    balancer: torch_eplb.ExpertLoadBalancer,
    reference: PreTrainedModel,
    text: dict[str, bytes],
    args: argparse.Namespace,
) -> tuple[History, Checks]:
    """The service: every rank has its own batch at each step, and all ranks make the same steps."""
    history, checks = History(balancer.placement), Checks()
    with Display(enabled=dist.get_rank() == 0) as display, torch.inference_mode():
        for request, batch in enumerate(traffic(text, args)):
            before, load_before = balancer.stats(), balancer.load()
            if request % 12 == 11:
                prompts, length = batch[:2, :48], 12
                ours = generate(balancer.module, prompts, length)
                checks.greedy_tokens(ours, generate(reference, prompts, length))
                continue
            logits = balancer(input_ids=batch, use_cache=False).logits
            stats = balancer.stats()
            # Checked now and then, and at each step in which experts have moved.
            if request % 8 == 0 or stats.placement_version != before.placement_version:
                expected = reference(input_ids=batch, use_cache=False).logits
                checks.logits(logits, expected)
            history.record(stats, load_before, balancer.load())
            display.show(history)
    return history, checks


def traffic(text: dict[str, bytes], args: argparse.Namespace) -> Iterator[Tensor]:
    """This rank's batches ``[sequences, length]``: a mix that all ranks have, text of its own."""
    generator = torch.Generator().manual_seed(args.seed * 1000 + dist.get_rank())
    streams = list(text.values())
    for step in range(args.steps):
        mix = mix_of_kinds(step / args.steps, len(streams))
        kinds = torch.multinomial(mix, args.batch, replacement=True, generator=generator)
        pieces = [windows(streams[kind], 1, args.length, generator) for kind in kinds.tolist()]
        yield torch.cat(pieces)


def mix_of_kinds(progress: float, kinds: int) -> Tensor:
    """Share of each kind when a part ``progress`` (0..1) of the run is over, ``[kinds]``.

    Six stretches: one favourite kind, a drift to the next favourite, an abrupt change to a third,
    a drift to a fourth, and so on.
    """

    def favourite(number: int) -> Tensor:
        mix = torch.full((kinds,), 0.25 / kinds)
        mix[number % kinds] += 0.75
        return mix

    stretch, inside = divmod(progress * 6, 1)
    first = int(stretch) // 2 * 2
    return torch.lerp(favourite(first), favourite(first + 1), inside * (stretch % 2))


def generate(model: PreTrainedModel, prompts: Tensor, length: int) -> Tensor:
    """Greedy continuation, ``[sequences, prompt + length]``."""
    mask = torch.ones_like(prompts)
    return model.generate(prompts, attention_mask=mask, max_new_tokens=length, do_sample=False)


def load_model() -> PreTrainedModel:
    return Qwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def start_ranks() -> None:
    """Becomes torchrun, which starts this script once per rank."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    ranks = ["--standalone", "--nproc-per-node", str(RANKS)]
    os.execve(sys.executable, [*torchrun, *ranks, *sys.argv], environment)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        help="files or folders to serve; each is one kind of text",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=240, help="batches that each rank serves")
    parser.add_argument("--redundant", type=int, default=8, help="redundant experts per layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="some seconds, for a quick check")
    args = parser.parse_args()
    try:
        args.streams = streams_of(args.text)
    except (OSError, ValueError) as error:
        parser.error(f"--text: {error}")
    args.batch, args.length, args.collect = 8, 128, 20
    if args.short:
        args.steps, args.batch, args.collect = 40, 4, 8
    return args


if __name__ == "__main__":
    main()
