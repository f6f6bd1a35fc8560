"""Choices replayed as CUDA graphs against the same choices launched kernel by kernel: equal picks, milliseconds.

    python benchmarks/replay.py     # on a CUDA device

Both take turns within one run, on fresh tokens each time. Needs ocvtp, torch and a CUDA device.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from machine import add_output, heading, machine, say
from torch import Tensor

import ocvtp.replay
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.selection import CHOICES

SIZES = ((1, 576, 64), (1, 576, 192), (8, 576, 64), (1, 2880, 160), (1, 2880, 640))
"""Images, tokens and kept ones: LLaVA-1.5's and LLaVA-NeXT's."""
WIDTH, SETTLED = 1024, 3


def rivals(device: torch.device) -> dict[str, Callable[[Tensor, int], Tensor]]:
    torch.manual_seed(0)
    pruner = OCPruner(PrunerConfig(WIDTH, decoder=None)).eval().to(device)

    def select(precision: str | None) -> Callable[[Tensor, int], Tensor]:
        return lambda tokens, keep: pruner.select(tokens, keep, seeds=list(range(len(tokens))), precision=precision)

    return {**CHOICES, "oc-vtp": select(None), "oc-vtp, bf16": select("bf16")}


def measured(
    choose: Callable[[Tensor, int], Tensor], images: int, count: int, keep: int, rounds: int
) -> dict[str, Any]:
    device = torch.device("cuda")
    taken: dict[str, list[float]] = {"launched": [], "replayed": []}
    same = True
    for number in range(SETTLED + rounds):
        tokens = torch.randn(images, count, WIDTH, device=device)
        chosen = {}
        for name in taken:
            with mock.patch.object(
                ocvtp.replay, "_can", (lambda _: False) if name == "launched" else ocvtp.replay._can
            ):
                torch.cuda.synchronize()
                start = time.perf_counter()
                chosen[name] = choose(tokens, keep)
                torch.cuda.synchronize()
            if number >= SETTLED:
                taken[name].append(time.perf_counter() - start)
        same &= torch.equal(chosen["launched"], chosen["replayed"])
    ms = {f"{name}_ms": 1000 * statistics.median(each) for name, each in taken.items()}
    return {"images": images, "tokens": count, "keep": keep, "same_picks": same, **ms,
            "ratio": ms["launched_ms"] / ms["replayed_ms"]}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    columns = ("choice", "images", "tokens", "kept", "launched, ms", "replayed, ms", "ratio", "same picks")
    lines = [heading(found["machine"]), "", f"| {' | '.join(columns)} |", "|:--|--:|--:|--:|--:|--:|--:|:--|"]
    for row in found["rows"]:
        size = f"{row['images']} | {row['tokens']} | {row['keep']}"
        times = f"{row['launched_ms']:.2f} | {row['replayed_ms']:.2f} | {row['ratio']:.1f}x"
        lines.append(f"| {row['choice']} | {size} | {times} | {'yes' if row['same_picks'] else 'NO'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each (default: 7)")
    add_output(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found: there is nothing to replay elsewhere")
    choices = rivals(torch.device("cuda"))
    rows = [
        {"choice": name, **measured(choose, *size, arguments.rounds)}
        for size in SIZES
        for name, choose in choices.items()
    ]
    say({"machine": machine("cuda"), "rows": rows}, table, arguments)


if __name__ == "__main__":
    main()
