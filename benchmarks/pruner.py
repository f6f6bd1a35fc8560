"""The pruner's speed: training against the published loop, choosing in batches, FLOPs and memory; losses and choices.

    python benchmarks/pruner.py                 # on two CPU cores about ten minutes
    python benchmarks/pruner.py --device cuda
    python benchmarks/pruner.py --only losses choices
    python benchmarks/pruner.py --quick         # small shapes, to see that it runs

Rivals take turns within one run, so that what else the machine does meets all of them. Needs ocvtp, torch and numpy.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import add_output, heading, machine, say
from plain_pruner import PlainPruner, area_weighted
from pruner_rivals import choices, lines, losses
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ocvtp.efficiency.flops import pruner_flops
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.reference import reference_config
from ocvtp.pruner.seeding import generator
from ocvtp.pruner.training.data import Batch
from ocvtp.pruner.training.optimiser import make_optimizer
from ocvtp.pruner.training.ranks import Ranks, StepLoss
from ocvtp.pruner.training.run import TrainConfig, compile_parts

RATE, CLIP = 3e-4, 1.0
PARTS = ("training", "choosing", "flops", "memory", "losses", "choices")


@dataclass(frozen=True)
class Size:
    """Of the tokens and the pruner: columns of the grid (and rows, if it is no square), token width, slots."""

    side: int = 24
    width: int = 1024
    slots: int = 64
    rows: int | None = None

    @property
    def tokens(self) -> int:
        return self.side * (self.rows or self.side)


CHOOSING = (Size(12, 96), Size(), Size(48, rows=60))
"""Of tiny-llava, LLaVA-1.5 and LLaVA-NeXT."""


def images(size: Size, count: int, seed: int) -> Tensor:
    """Tokens with objects in them, [count, N, C]: regions of one of 24 kinds, a code of the place, and noise."""
    draws = torch.Generator().manual_seed(seed)
    always = torch.Generator().manual_seed(1)
    kinds = torch.randn(24, size.width, generator=always)
    places = torch.randn(size.tokens, size.width, generator=always)
    at = torch.cartesian_prod(torch.arange(size.rows or size.side), torch.arange(size.side)).float()
    centres = torch.rand(count, 8, 2, generator=draws) * size.side
    region = torch.cdist(at.expand(count, -1, -1), centres).argmin(2)
    kind = torch.randint(24, (count, 8), generator=draws).gather(1, region)
    noise = torch.randn(count, size.tokens, size.width, generator=draws)
    return kinds[kind] + 0.5 * places + 0.5 * noise


# --- Training --------------------------------------------------------------------------------------------------------


class Plain:
    """The published loop."""

    name = "published loop, fp32"

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = PlainPruner(size.width, size.width // 2, size.tokens).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.size = size

    def step(self, tokens_BNC: Tensor, number: int) -> None:
        draws = torch.Generator().manual_seed(number)
        noise_BKD = torch.randn(len(tokens_BNC), self.size.slots, self.size.width // 2, generator=draws)
        rebuilt_BNC, attention_BKN = self.model(tokens_BNC, noise_BKD.to(tokens_BNC.device), draws)
        loss = area_weighted(rebuilt_BNC, tokens_BNC, attention_BKN)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        loss.item()

    def pruner(self) -> OCPruner:
        """As an OCPruner."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pth"
            torch.save(self.model.state_dict(), path)
            grid = (self.size.side, self.size.side)
            config = reference_config(token_dim=self.size.width, slot_dim=self.size.width // 2, grid=grid,
                                      decoder_heads=4)  # fmt: skip
            return OCPruner.from_reference_checkpoint(path, config)


class Ours:
    """The step of `ocvtp.pruner.training.run`, from the same weights."""

    name = "ocvtp, bf16"

    def __init__(self, size: Size, device: torch.device) -> None:
        self.model = Plain(size, torch.device("cpu")).pruner().to(device).train()
        self.config = TrainConfig(learning_rate=RATE, ignore_empty=False, decay_all=True)
        self.optimizer = make_optimizer(self.model, self.config)
        self.loss = StepLoss(self.model, self.config)
        self.size = size
        if device.type == "cuda":
            compile_parts(self.model)

    def step(self, tokens_BNC: Tensor, number: int) -> None:
        batch = Batch([0] * len(tokens_BNC), tokens_BNC, None, [(self.size.side, self.size.side)])
        draws = generator("benchmark", number)
        noise_BKD, plan = Ranks().draws(self.model, batch, len(tokens_BNC), self.size.slots, draws)
        loss = self.loss(batch, self.size.slots, noise_BKD, plan)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        torch.stack((loss.detach(), norm)).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def pruner(self) -> OCPruner:
        return self.model


@torch.no_grad()
def validation(pruner: OCPruner, size: Size, device: torch.device) -> float:
    """Mean squared error on unseen images of which 4 % of the tokens are seen, in single precision."""
    pruner = pruner.eval().to(device)
    tokens = images(size, 8, seed=99).to(device)
    shown = torch.rand(1, size.tokens, generator=torch.Generator().manual_seed(0)).argsort(1) < max(
        1, size.tokens // 24
    )
    grid = (size.side, size.side)
    out = pruner(tokens, size.slots, generator=torch.Generator().manual_seed(0), grid=grid, decode=shown.to(device))
    assert out.reconstruction is not None
    pruner.train()
    return float((out.reconstruction - tokens).square().mean())


def training(size: Size, device: torch.device, samples: int, batch: int, ours_batch: int) -> dict[str, Any]:
    """Seconds a sample of both loops, taking turns on the same images, and what they have learnt after them."""
    pool = images(size, max(batch, ours_batch) * 4, seed=7).to(device)
    rivals = {
        "plain": (Plain(size, device), batch),
        "ours": (Ours(size, device), ours_batch),
    }
    start = validation(rivals["plain"][0].pruner(), size, device)
    for rival, count in rivals.values():  # what the first call sets up, on weights that are then made anew
        rival.step(pool[:count], 0)
    rivals = {"plain": (Plain(size, device), batch), "ours": (Ours(size, device), ours_batch)}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    done = dict.fromkeys(rivals, 0)
    while min(done.values()) < samples:
        name = min(done, key=lambda one: done[one])
        rival, count = rivals[name]
        order = torch.randint(len(pool), (count,), generator=torch.Generator().manual_seed(done[name]))
        tokens = pool[order.to(device)]
        times[name].append(
            seconds(lambda rival=rival, tokens=tokens, name=name: rival.step(tokens, done[name]), device) / count
        )
        done[name] += count
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "samples": done,
        "batch": {"plain": batch, "ours": ours_batch},
        "samples_per_second": {name: 1 / median for name, median in medians.items()},
        "ratio": medians["plain"] / medians["ours"],
        "validation_mse": {
            "start": start,
            **{name: validation(one.pruner(), size, device) for name, (one, _) in rivals.items()},
        },
    }


# --- Choosing --------------------------------------------------------------------------------------------------------


def choosing(size: Size, device: torch.device, rounds: int) -> dict[str, Any]:
    """`select` on 32 images at once against one by one, in fp32 and bf16."""
    torch.manual_seed(0)
    slot_dim = size.width // 2
    pruner = OCPruner(PrunerConfig(size.width, grid=(size.side, size.side), slot_dim=slot_dim, decoder=None))
    pruner = pruner.eval().to(device)
    tokens = images(size, 32, seed=5).to(device)
    keep = size.slots

    def one_by_one(precision: str | None) -> Tensor:
        rows = [pruner.select(one, keep, precision=precision, check_values=False) for one in tokens.split(1)]
        return torch.cat(rows)

    def together(precision: str | None) -> Tensor:
        return pruner.select(tokens, keep, precision=precision, check_values=False)

    found: dict[str, Any] = {"tokens": size.tokens, "width": size.width, "keep": keep}
    chosen = {}
    for name, precision in (("fp32", None), ("bf16", "bf16")):
        chosen[name] = together(precision)
        one_by_one(precision)
        pairs = [(seconds(lambda p=precision: one_by_one(p), device), seconds(lambda p=precision: together(p), device))
                 for _ in range(rounds)]  # fmt: skip
        single, batch = (statistics.median(times) for times in zip(*pairs, strict=True))
        found[name] = {"one_by_one_ms": 1000 * single / 32, "batch_ms": 1000 * batch / 32, "ratio": single / batch}
    same = [len(set(a) & set(b)) / keep for a, b in zip(chosen["fp32"].tolist(), chosen["bf16"].tolist(), strict=True)]
    found["bf16"]["batch_against_fp32_one_by_one"] = found["fp32"]["one_by_one_ms"] / found["bf16"]["batch_ms"]
    found["bf16"]["same_tokens_as_fp32"] = statistics.mean(same)
    return found


def flops() -> list[dict[str, Any]]:
    """What PyTorch counts of choosing, against the closed form."""
    rows = []
    for tokens, slots in ((576, 64), (2880, 64)):
        with torch.device("meta"):
            pruner = OCPruner(PrunerConfig(1024, decoder=None))
            data = torch.empty(1, tokens, 1024)
            queries = torch.empty(1, slots, 512)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pruner(data, slots, queries=queries, check_values=False)
        formula = pruner_flops(tokens, 1024, slots)
        counted = counter.get_total_flops()
        rows.append(
            {"tokens": tokens, "slots": slots, "counted": counted, "formula": formula, "ratio": counted / formula}
        )
    return rows


# --- Memory ----------------------------------------------------------------------------------------------------------


def memory(size: Size, device: torch.device, batch: int, which: str) -> float:
    """Bytes that two steps take at most beside the tokens: of the device, or of a process of its own."""
    tokens = images(size, batch, seed=7).to(device)
    before = peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    rival = (Plain if which == "plain" else Ours)(size, device)
    for number in range(2):
        rival.step(tokens, number)
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak()) - before


def peak() -> int:
    """Bytes of memory that this process has had at most. `getrusage` would count its parent before `exec` too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def memories(arguments: argparse.Namespace, batch: int) -> dict[str, float]:
    found = {}
    for which in ("plain", "ours"):
        command = [sys.executable, __file__, "--device", arguments.device, "--memory", which, "--batch", str(batch)]
        command += ["--quick"] * arguments.quick
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[which] = float(done.stdout)
    return found


# --- All of it -------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of some work, until the device is done with it."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def table(found: dict[str, Any]) -> str:
    made = [heading(found["machine"])]
    for part, told in ((_training, "training"), (_choosing, "choosing"), (_flops, "flops")):
        made += part(found) if told in found else []
    return "\n".join([*made, *lines(found)])


def _training(found: dict[str, Any]) -> list[str]:
    train, kept = found["training"], found.get("memory_bytes", {"plain": math.nan, "ours": math.nan})
    rate, loss = train["samples_per_second"], train["validation_mse"]
    return [
        "",
        "| training a sample | samples/s | against the published loop | validation MSE | memory of a step |",
        "|:--|--:|--:|--:|--:|",
        f"| published loop, fp32, batch {train['batch']['plain']} | {rate['plain']:.2f} | 1.0x | {loss['plain']:.4f} | "
        f"{kept['plain'] / 1e9:.2f} GB |",
        f"| ocvtp, bf16, batch {train['batch']['ours']} | {rate['ours']:.2f} | {train['ratio']:.2f}x | "
        f"{loss['ours']:.4f} | {kept['ours'] / 1e9:.2f} GB |",
        "",
        f"After {train['samples']['ours']} samples each; before the first: {loss['start']:.4f}.",
    ]


def _choosing(found: dict[str, Any]) -> list[str]:
    made = ["", "| choosing, ms an image | one by one | 32 at once | ratio |", "|:--|--:|--:|--:|"]
    for one in found["choosing"]:
        for name in ("fp32", "bf16"):
            row = one[name]
            what = f"{one['tokens']} x {one['width']}, keep {one['keep']}, {name}"
            made.append(f"| {what} | {row['one_by_one_ms']:.2f} | {row['batch_ms']:.2f} | {row['ratio']:.2f}x |")
        single, batch = one["fp32"]["one_by_one_ms"], one["bf16"]["batch_ms"]
        ratio = one["bf16"]["batch_against_fp32_one_by_one"]
        made.append(f"| the same: bf16 at once against fp32 one by one | {single:.2f} | {batch:.2f} | {ratio:.2f}x |")
    return made


def _flops(found: dict[str, Any]) -> list[str]:
    made = ["", "| FLOPs of choosing | counted by torch | closed form | ratio |", "|:--|--:|--:|--:|"]
    for row in found["flops"]:
        made.append(f"| {row['tokens']} tokens, {row['slots']} slots | {row['counted'] / 1e9:.3f} G | "
                     f"{row['formula'] / 1e9:.3f} G | {row['ratio']:.4f} |")  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--samples", type=int, default=None, help="to train on (default: 96 on a CPU, else 4800)")
    parser.add_argument("--batch", type=int, default=12, help="of the published loop (default: 12, as published)")
    parser.add_argument("--ours-batch", type=int, default=None, help="of ours (default: 12 on a CPU, else 96)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--seconds", type=float, default=None, help="of each loss's training (default: 30)")
    add_output(parser)
    parser.add_argument("--memory", choices=("plain", "ours"), default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    size = Size(8, 64, 8) if arguments.quick else Size()
    if arguments.memory:
        print(memory(size, device, arguments.batch, arguments.memory))
        return
    samples = arguments.samples or (24 if arguments.quick else 96 if on_cpu else 4800)
    ours = arguments.ours_batch or (arguments.batch if on_cpu else 96)
    sizes = [size] if arguments.quick else [Size(12, 96, 16), size]
    quick = arguments.quick
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "training": ("training", lambda: training(size, device, samples, arguments.batch, ours)),
        "choosing": ("choosing", lambda: [choosing(one, device, 3 if on_cpu else 20) for one in sizes]),
        "flops": ("flops", flops),
        "memory": ("memory_bytes", lambda: memories(arguments, arguments.batch)),
        "losses": ("losses", lambda: losses(40 if quick else 256, arguments.seconds or (1 if quick else 30), device)),
        "choices": ("choices", lambda: choices(
            lambda size: images(size, 2, seed=11), [Size(8, 64)] if quick else CHOOSING, 3 if on_cpu else 20, device)),
    }  # fmt: skip
    done = {key: work() for name, (key, work) in parts.items() if name in arguments.only}
    found = {"machine": machine(arguments.device), **done}
    say(found, table, arguments)


if __name__ == "__main__":
    main()
