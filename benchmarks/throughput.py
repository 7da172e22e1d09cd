"""The reference classifiers beside timm's closest relatives of as many parameters.

    python -m benchmarks.throughput --write benchmarks/results/throughput.md

A relative is timm's plain vision transformer of the same width, depth and MLP, or its MLP-Mixer with as many blocks as
give as many parameters. A model may take as much more time than its relative as it does more work: the last columns are
the ratio of times over the ratio of MACs. Model and relative take turns in one process, on one thread, in process CPU
time; MACs are counted by torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import distillkit.models.classifiers  # noqa: F401  # registers them
from benchmarks.machine import heading, write
from distillkit.bench.report import table
from distillkit.bench.timing import race

SIZE = 224


Relative = Callable[[], nn.Module]


def vit(width: int, depth: int, heads: int) -> tuple[str, Relative]:
    name = f"ViT, {depth} blocks of width {width}, {heads} heads"
    return name, partial(VisionTransformer, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=3.0)


def mixer(blocks: int) -> tuple[str, Relative]:
    return f"MLP-Mixer, {blocks} blocks of width 768", partial(MlpMixer, num_blocks=blocks, embed_dim=768)


RELATIVES = {
    "lvvit_t": vit(240, 12, 4),
    "lvvit_s": vit(384, 16, 6),
    "lvvit_m": vit(512, 20, 8),
    "lvvit_l": vit(768, 24, 12),
    "deepvit_16b": vit(384, 16, 12),
    "deepvit_24b": vit(384, 24, 12),
    "deepvit_32b": vit(384, 32, 12),
    "deepvit_s": vit(396, 16, 12),
    "deepvit_l": vit(420, 32, 12),
    "refiner_vit_s": vit(384, 16, 12),
    "refiner_vit_m": vit(420, 32, 12),
    "refiner_vit_l": vit(512, 32, 16),
    "vip_s14": mixer(6),
    "vip_s7": mixer(5),
    "vip_m7": mixer(11),
    "vip_l7": mixer(18),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--model", action="append", choices=list(RELATIVES), help="only this one; several times")
    parser.add_argument("--write", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = ["model", "relative in timm", "parameters, M", "GMACs", "MACs ratio"]
    head += ["ms a picture", "time ratio", "over MACs ratio", "training: time ratio", "over MACs ratio"]
    rows = []
    for name in args.model or RELATIVES:
        rows.append(row(name, *RELATIVES[name], args.batch, args.rounds))
        print(" | ".join(rows[-1]), flush=True)
    text = [
        heading("Throughput of classifiers", f"python -m benchmarks.throughput --rounds {args.rounds}", seed=0),
        f"Batches of {args.batch} pictures of {SIZE} x {SIZE}, float32; medians. Forward in eval mode without "
        "gradients, and training: forward and backward. The two numbers of a cell are the model's and its relative's.",
        table(head, rows),
    ]
    write("\n\n".join(text), args.write)


def row(name: str, relative: str, make: Relative, batch: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    pair = [timm.create_model(name), make()]
    pictures = torch.randn(batch, 3, SIZE, SIZE)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in pair]
    work = [macs(model, pictures[:1]) / 1e9 for model in pair]
    forward = times(pair, pictures, rounds, training=False)
    training = times(pair, pictures, rounds, training=True)
    more = work[0] / work[1]
    return [
        name,
        relative,
        both(sizes, ".1f"),
        both(work, ".2f"),
        f"{more:.2f}",
        both([1e3 * seconds / batch for seconds in forward], ".0f"),
        *(text for t in (forward, training) for text in (f"{t[0] / t[1]:.2f}", f"{t[0] / t[1] / more:.2f}")),
    ]


def macs(model: nn.Module, picture: Tensor) -> float:
    """Multiplications with addition in one forward: products of matrices, convolutions and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(picture)
    return counter.get_total_flops() / 2


def times(pair: list[nn.Module], pictures: Tensor, rounds: int, training: bool) -> list[float]:
    """Median CPU seconds of each of two models."""

    def form(model: nn.Module) -> Tensor:
        model.train(training)
        if not training:
            with torch.inference_mode():
                return model(pictures)
        model.zero_grad(set_to_none=True)
        logits = model(pictures)
        logits.square().mean().backward()
        return logits.detach()

    _, seconds = race({str(i): lambda model=model: form(model) for i, model in enumerate(pair)}, rounds)
    return list(seconds.values())


def both(values: list[float], form: str) -> str:
    return " / ".join(f"{value:{form}}" for value in values)


if __name__ == "__main__":
    main()
