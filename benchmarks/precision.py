"""How many of the kept tokens are the same in bfloat16: of the VLM, and of the pruner's matrix products.

    python benchmarks/precision.py --pruner FOLDER    # a trained pruner of tiny-llava; on a core two minutes
    python benchmarks/precision.py --quick            # few scenes, to see that it runs

tiny-llava on scenes. `vlm`: its weights, activations and tokens in bfloat16, where choices compute in float32 all the
same; `bf16`, `fp16`: the same float32 tokens, and that `precision` of `oc-vtp`. Each against all in float32: the share
of the kept tokens, and of the images whose tokens are all the same. Needs ocvtp, torch and transformers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from machine import add_output, heading, machine, say
from PIL import Image

import ocvtp
from ocvtp.data.scenes import make_scene
from ocvtp.vlms import load

KEEPS = (16, 32, 48)
METHODS = ("css", "qr", "fps", "medoids", "visionzip", "hiprune", "oc-vtp-untrained")


def kept(model: Any, inputs: dict[str, torch.Tensor], method: str, keep: int, **options: Any) -> list[set[int]]:
    call = {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in inputs.items()}
    with ocvtp.prune(model, method, keep, **options) as handle:
        return [set(each.kept) for each in handle.embed(call)]


def same(plain: list[set[int]], others: list[set[int]]) -> dict[str, float]:
    both = sum(len(one & other) for one, other in zip(plain, others, strict=True))
    alike = sum(one == other for one, other in zip(plain, others, strict=True))
    return {"tokens": both / sum(map(len, plain)), "images": alike / len(plain)}


def table(found: dict[str, Any]) -> str:
    kinds = {"vlm": "VLM in bf16", "bf16": "products in bf16", "fp16": "products in fp16"}
    columns = ("method", "kept", *(text for name in kinds.values() for text in (f"{name}: tokens", "images")))
    lines = [heading(found["machine"]), "", f"| {' | '.join(columns)} |", "|:--|" + "--:|" * (len(columns) - 1)]
    for row in found["rows"]:
        cells = [f"{100 * row[kind][what]:.1f} %" if kind in row else ""
                 for kind in kinds for what in ("tokens", "images")]  # fmt: skip
        lines.append(f"| {row['method']} | {row['keep']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="scenes (default: 200)")
    parser.add_argument("--pruner", default=None, help="folder of a trained pruner of tiny-llava, for oc-vtp")
    parser.add_argument("--quick", action="store_true", help="16 scenes and one budget, to see that it runs")
    add_output(parser)
    arguments = parser.parse_args()
    images = 16 if arguments.quick else arguments.images
    plain, half = load("tiny-llava", device="cpu"), load("tiny-llava", device="cpu", dtype=torch.bfloat16)
    scenes = [Image.fromarray(make_scene(0, "benchmark", number).pixels_HW3) for number in range(images)]
    inputs = dict(plain.processor(images=scenes, text=["<image>"] * images, return_tensors="pt", padding=True))
    methods: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    if arguments.pruner is not None:
        methods["oc-vtp"] = {"pruner": arguments.pruner, "other_vlm": True}  # the same one, of another folder
    rows = []
    for name, options in methods.items():
        for keep in KEEPS[:1] if arguments.quick else KEEPS:
            wanted = kept(plain.model, inputs, name, keep, **options)
            row = {"method": name, "keep": keep, "vlm": same(wanted, kept(half.model, inputs, name, keep, **options))}
            if name.startswith("oc-vtp"):
                for precision in ("bf16", "fp16"):
                    others = kept(plain.model, inputs, name, keep, precision=precision, **options)
                    row[precision] = same(wanted, others)
            rows.append(row)
    say(
        {
            "machine": machine(),
            "images": images,
            "pruner": arguments.pruner and Path(arguments.pruner).name,
            "rows": rows,
        },
        table,
        arguments,
    )


if __name__ == "__main__":
    main()
