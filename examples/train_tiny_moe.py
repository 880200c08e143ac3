"""Trains the tiny byte-level Qwen3-MoE model that the other examples serve.

    python examples/train_tiny_moe.py --out examples/data/tiny_moe

Six kinds of text, 4 MoE layers of 32 experts, top-4, 3.4 million parameters; about ten minutes on
two cores. The auxiliary loss asks for balance over a batch that mixes all kinds, and so leaves the
experts free to specialise by kind: a model that looks balanced in training and is not when it
serves one kind more than the others.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from _text import builtin_streams, windows
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

LENGTH = 256
# Sequences per batch: more of the kinds that are hard to learn.
BATCH = {"code": 5, "docs": 4, "codecs": 1, "unicode": 2, "html": 1, "trees": 3}
RANKS = 4

CONFIG = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    norm_topk_prob=True,
    tie_word_embeddings=True,
    initializer_range=0.04,
    max_position_embeddings=1024,
    router_aux_loss_coef=0.003,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def main() -> None:
    args = parse_arguments()
    disable_progress_bar()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    text = builtin_streams(held_out=False)
    print("bytes to train on:", {kind: len(stream) for kind, stream in text.items()})

    model = Qwen3MoeForCausalLM(CONFIG)
    model.set_experts_implementation("grouped_mm")  # the fastest one in training on CPU
    train(model, text, args.steps, args.learning_rate, generator)
    report(model, builtin_streams(held_out=True), generator)

    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"wrote {args.out}: {size / 1e6:.2f} MB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(
    model: Qwen3MoeForCausalLM,
    text: dict[str, bytes],
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """AdamW with a short warm-up and a cosine decay; prints each kind's loss as it goes."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01),
    )
    kinds = [kind for kind, count in BATCH.items() for _ in range(count)]
    recent = torch.zeros(len(kinds))
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        tokens = torch.cat([windows(text[k], n, LENGTH, generator) for k, n in BATCH.items()])
        output = model(input_ids=tokens, output_router_logits=True)
        losses = bits_per_byte(output.logits, tokens)
        # `aux_loss` is 1 per chosen expert, that is `top_k`, when experts are used evenly.
        loss = losses.mean() * math.log(2) + CONFIG.router_aux_loss_coef * output.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        recent = torch.lerp(recent, losses.detach(), max(0.05, 1 / step))
        if step % 50 == 0 or step == steps:
            shown = " ".join(
                f"{kind} {recent[[k == kind for k in kinds]].mean():.2f}" for kind in BATCH
            )
            seconds = time.perf_counter() - begin
            print(f"step {step:5d}  {seconds:4.0f} s  bits per byte: {shown}", flush=True)


@torch.no_grad()
def report(model: Qwen3MoeForCausalLM, text: dict[str, bytes], generator: torch.Generator) -> None:
    """Prints loss, a continuation and the skew of routing for every kind of held-out text."""
    model.eval()
    for kind, stream in text.items():
        tokens = windows(stream, 16, LENGTH, generator)
        output = model(input_ids=tokens, output_router_logits=True)
        frequency = torch.bincount(tokens.flatten()) / tokens.numel()
        unigram = -torch.special.xlogy(frequency, frequency).sum().item() / math.log(2)
        par = [rank_par(logits) for logits in output.router_logits]
        print(
            f"\n== {kind}: {bits_per_byte(output.logits, tokens).mean():.2f} bits per byte "
            f"(byte frequencies alone: {unigram:.2f}); "
            f"PAR of {RANKS} ranks per layer: {' '.join(f'{p:.2f}' for p in par)}"
        )
        prompt = tokens[:1, :96]
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=96, do_sample=False
        )[0, 96:]
        print(f"{as_text(prompt[0])!r}\n-> {as_text(answer)!r}")


def bits_per_byte(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of the next byte in bits, ``[sequences]``."""
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.mean(dim=1) / math.log(2)


def rank_par(router_logits: Tensor) -> float:
    """Peak-to-average ratio of the ranks' load when each holds its even share of experts."""
    chosen = router_logits.topk(CONFIG.num_experts_per_tok).indices
    load = torch.bincount(chosen.flatten(), minlength=CONFIG.num_experts)
    ranks = load.view(RANKS, -1).sum(dim=1)
    return (ranks.max() / ranks.float().mean()).item()


def as_text(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


if __name__ == "__main__":
    main()
