"""`ocvtp show`: the tokens that methods keep of an image, drawn over it."""

import argparse
from math import isqrt
from pathlib import Path
from typing import Any

from ocvtp.commands import common, model
from ocvtp.errors import BadInput


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(subparsers, "show", run, "draw the tokens that methods keep of an image",
                        "A row for each budget, a column for each method.")  # fmt: skip
    parser.add_argument("image", type=Path, help="a JPEG, PNG, WebP, ... file")
    model.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=None, help="the PNG to write (default: IMAGE-kept.png, here)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prune, draw and write."""
    out = args.out or Path(f"{args.image.stem}-kept.png")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{out} cannot be written: the folder {out.absolute().parent} does not exist")
    image = model.read_image(args.image)

    from ocvtp import figures, vlms

    vlm = vlms.load(args.vlm, device=model.device(args.device))
    inputs = model.inputs(vlm, image, args.prompt)
    grid, fit = _grid(args.vlm, vlm, inputs)
    rows, found = [], []
    for budget in args.keep:
        panels = [figures.Panel(image, None, grid, "image", fit)]
        for method in args.methods:
            with model.pruned(vlm, method, budget, args.pruner) as handle:
                vlm.model.generate(**inputs, max_new_tokens=1, do_sample=False)
                kept = None if handle is None else [int(index) for index in handle.last_kept[0]]
            count = grid[0] * grid[1] if kept is None else len(kept)
            panels.append(figures.Panel(image, kept, grid, f"{method}, {count} tokens", fit))
            found.append({"method": method, "keep": budget, "tokens": count, "kept": kept})
        rows.append(panels)
    out.write_bytes(figures.kept_tokens(rows, width=2.3))
    if args.json:
        common.print_json({"image": str(args.image), "out": str(out), "grid": list(grid), "methods": found})
    else:
        common.console().print(
            f"{out}: {len(found)} drawings on a grid of {grid[0]} x {grid[1]} tokens", soft_wrap=True
        )
    return 0


def _grid(name: str, vlm: Any, inputs: Any) -> tuple[tuple[int, int], Any]:
    """Rows and columns of tokens, and how they lie over the picture."""
    if "image_grid_thw" in inputs:
        merge = vlm.model.config.vision_config.spatial_merge_size
        _, rows, columns = (int(n) for n in inputs["image_grid_thw"][0])
        return (rows // merge, columns // merge), "stretch"
    tokens = int((inputs["input_ids"][0] == vlm.model.config.image_token_id).sum())
    side = isqrt(tokens)
    if side * side != tokens:
        raise BadInput(
            f"{name} cuts this image into {tokens} tokens on several tiles, which cannot be drawn on one grid"
        )
    return (side, side), "pad"
