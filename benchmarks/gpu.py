"""All methods on large VLMs with random weights, phase by phase against the limits of the device, and the pruner.

    python benchmarks/gpu.py                    # on an H100 or H200 at most eight minutes
    python benchmarks/gpu.py --device cpu --quick   # small models, to see that it runs

Weights are random and made on the device: time and memory do not depend on what they say. Methods take turns within a
run, so that what else the machine does meets all of them. The pruner comes first; what of the VLMs does not fit into
`--minutes` is named.

The larger batch is 8, unless another is given: there products bound the prefill even of the fewest tokens, not launches
(20 ms at batch 1, whatever its length) and not weights (which bound it below some 180 rows), so that an image can gain
little from more; and LLaVA-NeXT, which takes 0.7 s then, leaves no time for it. Needs ocvtp, torch and transformers.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from machine import add_output, heading, machine, say
from methods import text_tower
from pruner import Size, choosing, training

import ocvtp
from ocvtp import streams
from ocvtp.efficiency import random_vlm
from ocvtp.efficiency.flops import pruner_flops
from ocvtp.efficiency.latency import Latency, measure
from ocvtp.efficiency.roofline import Ceilings, distance, least
from ocvtp.efficiency.shapes import VlmShape, shape_of
from ocvtp.errors import OcvtpError
from ocvtp.methods import REGISTRY, Budget
from ocvtp.vlms.families import family_of

BUDGETS = {
    "llava-1.5-7b": (64, 128, 192),
    "llava-next-7b": (160, 320, 640),
    "qwen2.5-vl-7b": ("11.1%", "22.2%", "33.3%"),
}
"""Of the paper, the smallest first."""
FEW = ("random", "css", "oc-vtp-untrained")
"""Methods that are measured at all budgets and with long answers; the others at the smallest budget."""
ASIDE = ("fps", "medoids", "oc-vtp-untrained")
"""Methods that choose by layer 9, also measured with the choice on a side stream (`ocvtp.streams`)."""
SKIPPED = ("vanilla", "oc-vtp")
"""`oc-vtp` computes what `oc-vtp-untrained` does, with other weights."""
BESIDE = ", beside the tower"
TEXT, ANSWER = 32, 32
KEYS = ("tower", "method", "projector", "prefill", "other", "first_token", "next_token")


class Clock:
    """What is left of the time."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def has(self, seconds: float, what: str) -> bool:
        """Whether there is time for something; what there is none for is noted."""
        if time.monotonic() + seconds < self._end:
            return True
        self.left_out.append(f"{what}: no time")
        return False


@dataclass(frozen=True)
class Plan:
    """Of a table: methods and budgets that take turns."""

    batch: int
    new_tokens: int
    methods: tuple[str, ...]
    budgets: tuple[int | str, ...]


def plans(budgets: tuple[int | str, ...], batch: int, every: tuple[str, ...], *, quick: bool) -> Iterator[Plan]:
    if quick:
        yield Plan(batch, 3, (*FEW, "fastv"), budgets[:1])
        return
    yield Plan(1, 1, every, budgets[:1])
    yield Plan(1, ANSWER, FEW, budgets[:1])
    yield Plan(batch, 1, every, budgets[:1])
    yield Plan(1, 1, FEW, budgets[1:])


def tabled(
    model: Any,
    shape: VlmShape,
    plan: Plan,
    ceilings: Ceilings,
    repeats: int,
    options: dict[str, Any],
    clock: Clock,
    **sizes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of each case, and how far they are from the least."""
    inputs = random_vlm.random_inputs(model, plan.batch, text_tokens=TEXT, **sizes)
    cases: dict[str, Any] = {"vanilla": lambda: ocvtp.prune(model, "vanilla")}
    budgets: dict[str, tuple[str, int | str]] = {"vanilla": ("vanilla", "100%")}
    for keep in plan.budgets:
        for name in plan.methods:
            try:
                with ocvtp.prune(model, name, keep, **options.get(name, {})):
                    model.generate(**inputs, do_sample=False, max_new_tokens=1)
            except (OcvtpError, RuntimeError) as error:  # out of memory is one
                clock.left_out.append(f"{name}, keep {keep}, batch {plan.batch}: {error}")
                continue
            case = f"{name}, keep {keep}"
            cases[case], budgets[case] = (
                (lambda n=name, k=keep: ocvtp.prune(model, n, k, **options.get(n, {}))),
                (name, keep),
            )
            if name in ASIDE:
                cases[f"{case}{BESIDE}"] = lambda pruned=cases[case]: aside(pruned)
    failed: dict[str, str] = {}
    times = measure(model, inputs, cases, new_tokens=plan.new_tokens, repeats=repeats, warmup=1, failed=failed)
    clock.left_out += [f"{case}, batch {plan.batch}: {why}" for case, why in failed.items()]
    whole = family_of(model).counts(family_of(model).images(inputs))[0]  # type: ignore[arg-type]
    rows = []
    for case, (name, keep) in budgets.items():
        if case not in times:
            continue
        kept = whole if name == "vanilla" else Budget.parse(keep).tokens(whole)
        layers = REGISTRY[name].by_layer(whole, kept, shape.llm.layers, options.get(name, {}))
        row = {"method": name, "kept": kept, **_row(times[case], shape, ceilings, whole, layers, plan, name)}
        rival = times.get(f"random, keep {keep}")
        row["against_random"] = None if rival is None else times[case].against(rival)
        row["against_vanilla"] = (
            times[case].total.median / times["vanilla"].total.median if "vanilla" in times else None
        )
        rows.append(row)
    beside = [
        {
            "case": case,
            "ms": times[case + BESIDE].first_token.median,
            "ratio": times[case + BESIDE].against(times[case]),
        }
        for case in budgets
        if case in times and case + BESIDE in times
    ]
    return {
        "batch": plan.batch, "new_tokens": plan.new_tokens, "tokens": whole, "rows": rows, "side_stream": beside
    }  # fmt: skip


@contextmanager
def aside(pruned: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A model pruned with the choice on a side stream."""
    with mock.patch.dict(os.environ, {streams.SWITCH: "1"}), pruned():
        yield


def _row(
    took: Latency, shape: VlmShape, ceilings: Ceilings, whole: int, layers: list[int], plan: Plan, name: str
) -> dict[str, Any]:
    """`layers`: tokens of an image that each layer of the language model reads."""
    pruner = pruner_flops(whole, shape.tower.width, layers[0]) if name == "oc-vtp-untrained" else 0
    limit = least(shape, ceilings, image_tokens=whole, kept=layers, text_tokens=TEXT, batch=plan.batch, method=pruner)
    ms = {name: spread.median for name, spread in took.phases.items()}
    ms |= {"first_token": took.first_token.median, "next_token": took.next_token and took.next_token.median}
    return {
        "ms": ms,
        "total_ms": took.total.median,
        "quartiles_of_first_token": [took.first_token.low, took.first_token.high],
        "phases_over_first_token": took.accounted,
        "least_ms": limit,
        "distance": distance(ms, limit),
        "peak_memory_bytes": took.peak_memory_bytes,
    }


def vlm(name: str, ceilings: Ceilings, arguments: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """All tables of one VLM, as far as time goes."""
    model = _small(name, arguments.device) if arguments.quick else random_vlm.random_vlm(name, device=arguments.device)
    shape = shape_of(model.config)
    options = {} if model.config.model_type.startswith("qwen") else {"trim": text_tower(model)}
    sizes = {"pixels": (112, 112)} if arguments.quick else {}
    tables = []
    for plan in plans(
        BUDGETS[name] if not arguments.quick else ("50%",),
        arguments.batch,
        tuple(arguments.methods),
        quick=arguments.quick,
    ):
        what = f"{name}, batch {plan.batch}, {plan.new_tokens} new tokens"
        if clock.has(0 if arguments.quick else 25, what):
            started = time.monotonic()
            tables.append(tabled(model, shape, plan, ceilings, arguments.repeats, options, clock, **sizes))
            print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    parameters = sum(each.numel() for each in model.parameters())
    return {"vlm": name, "parameters": parameters, "dtype": str(model.dtype).removeprefix("torch."), "tables": tables}


def _small(name: str, device: str) -> Any:
    """The same kind of VLM with two layers, a fraction as wide."""
    config = random_vlm.config_of(name)
    text, vision = config.get_text_config(), config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 256, 4
    text.num_attention_heads = text.num_key_value_heads = 2
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types[:4]
    if hasattr(vision, "depth"):
        vision.depth, vision.out_hidden_size, vision.hidden_size, vision.num_heads = 10, 256, 160, 2
        vision.intermediate_size, vision.fullatt_block_indexes = 160, [3, 9]
    else:
        vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = (
            11,
            64,
            64,
            2,
        )
        vision.image_size = 84
        config.image_grid_pinpoints = [[168, 168]]
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config).eval().to(device)


def pruner(arguments: argparse.Namespace) -> dict[str, Any]:
    """Training against the published loop, and choosing, at the paper's size."""
    device = torch.device(arguments.device)
    size = Size(8, 64, 8) if arguments.quick else Size()
    samples, ours = (24, 12) if arguments.quick else (2400, 96)
    sizes = [size] if arguments.quick else [size, replace(size, side=48, rows=60)]
    return {
        "training": training(size, device, samples, 12, ours),
        "choosing": [choosing(one, device, 3 if arguments.quick else 10) for one in sizes],
    }


def table(found: dict[str, Any]) -> str:
    lines = [heading(found["machine"]), ""]
    if "ceilings" in found:
        lines.append(f"Ceilings, measured: {found['ceilings']['flops'] / 1e12:.1f} TFLOP/s in matrix products, "
                     f"{found['ceilings']['bandwidth'] / 1e12:.3f} TB/s in copies")  # fmt: skip
    for one in found["vlms"]:
        lines += ["", f"## {one['vlm']}: {one['parameters'] / 1e9:.2f} G parameters, random, {one['dtype']}"]
        for each in one["tables"]:
            lines += _table(each)
    if "pruner" in found:
        lines += _pruner(found["pruner"])
    lines += ["", *(f"left out: {each}" for each in found["left_out"])]
    return "\n".join(lines)


def _table(found: dict[str, Any]) -> list[str]:
    keys = KEYS if found["new_tokens"] > 1 else KEYS[:-1]
    names = " | ".join(keys).replace("_", " ")
    lines = [
        "",
        f"Batch {found['batch']}, {found['tokens']} tokens an image, {found['new_tokens']} new tokens; milliseconds, "
        "and in brackets times the least",
        "",
        f"| method | kept | {names} | against random | whole answer against vanilla | peak GB |",
        f"|:--|--:|{'--:|' * (len(keys) + 3)}",
    ]
    for row in found["rows"]:
        cells = []
        for key in keys:
            far = row["distance"].get(key)
            cells.append(f"{row['ms'][key]:.2f}" + (f" ({far:.1f})" if far else ""))
        peak = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.1f}"
        ratios = ["-" if row[name] is None else f"{row[name]:.3f}x" for name in ("against_random", "against_vanilla")]
        lines.append(f"| {row['method']} | {row['kept']} | {' | '.join([*cells, *ratios, peak])} |")
    for each in found["side_stream"]:
        lines += [
            "",
            f"{each['case']}, chosen on a side stream: first token {each['ms']:.2f} ms, {each['ratio']:.3f}x.",
        ]
    return lines


def _pruner(found: dict[str, Any]) -> list[str]:
    train = found["training"]
    rate = train["samples_per_second"]
    lines = [
        "",
        "## The pruner",
        "",
        f"Training: the published loop {rate['plain']:.1f} samples/s, ocvtp {rate['ours']:.1f}: {train['ratio']:.1f}x.",
        "",
        "| choosing, ms an image | fp32, one by one | bf16, 32 at once | same tokens |",
        "|:--|--:|--:|--:|",
    ]
    for one in found["choosing"]:
        lines.append(f"| {one['tokens']} x {one['width']}, keep {one['keep']} | {one['fp32']['one_by_one_ms']:.3f} | "
                     f"{one['bf16']['batch_ms']:.3f} | {100 * one['bf16']['same_tokens_as_fp32']:.1f} % |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--models", nargs="*", choices=list(BUDGETS), default=list(BUDGETS), help="default: all")
    every = [name for name in REGISTRY if name not in SKIPPED]
    parser.add_argument("--methods", nargs="+", choices=every, default=every, help="of the full tables (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="of the second table (default: 8, see above)")
    parser.add_argument("--repeats", type=int, default=5, help="of each case (default: 5)")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing new begins (default: 7.5)")
    parser.add_argument("--skip-pruner", action="store_true", help="leave training and choosing of the pruner out")
    parser.add_argument("--quick", action="store_true", help="small models, few runs, to see that it runs")
    parser.add_argument("--markdown", type=Path, default=None, help="write the tables here, too")
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device was found: --device cpu --quick shows that the benchmark runs")
    if arguments.quick:
        arguments.repeats, arguments.batch = 1, 2
    clock, vlms = Clock(arguments.minutes), list[dict[str, Any]]()
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    ceilings = Ceilings.measured(arguments.device, dtype)
    found = {"machine": machine(arguments.device, transformers=transformers.__version__),
             "ceilings": ceilings.as_dict(), "vlms": vlms, "left_out": clock.left_out}  # fmt: skip

    def measure_all(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except torch.OutOfMemoryError as error:
            clock.left_out.append(f"{name}: {error}")
        if arguments.device != "cpu":
            torch.cuda.empty_cache()
        if arguments.out is not None:  # what is done is not lost if the rest takes too long
            say(found, lambda _: "", arguments)

    if not arguments.skip_pruner:
        measure_all("pruner", lambda: found.update(pruner=pruner(arguments)))
    for name in arguments.models:
        measure_all(name, lambda name=name: vlms.append(vlm(name, ceilings, arguments, clock)))
    say(found, table, arguments)
    if arguments.markdown is not None:
        arguments.markdown.write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
