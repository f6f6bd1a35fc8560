"""`ocvtp show`: the tokens that methods keep of an image, and the segments of their slots, drawn over it."""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from ocvtp.commands import common, pruned_vlm
from ocvtp.errors import BadInput


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(subparsers, "show", run, "draw the tokens that methods keep of an image",
                        "A row for each budget, a column for each method, and one for its slots if it has any: there "
                        "each token has the colour of the slot that attends to it most.")  # fmt: skip
    parser.add_argument("image", type=Path, help="a JPEG, PNG, WebP, ... file")
    pruned_vlm.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=None, help="the PNG to write (default: IMAGE-kept.png, here)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prune, draw and write."""
    out = args.out or Path(f"{args.image.stem}-kept.png")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{out} cannot be written: the folder {out.absolute().parent} does not exist")
    image = pruned_vlm.read_image(args.image)

    from ocvtp import figures, vlms

    vlm = vlms.load(args.vlm, device=pruned_vlm.device(args.device))
    family = vlms.family_of(vlm.model)
    image = family.prepare(vlm.processor, image)
    inputs = pruned_vlm.inputs(vlm, image, args.prompt)
    images = family.images(inputs)
    assert images is not None  # noqa: S101 - the processor was given one
    maps = family.maps(images, 0)
    rows, found = [], []
    for budget in args.keep:
        drawn = [[figures.Panel(_under(image, map_), title=map_.name or "image")] for map_ in maps]
        for method in args.methods:
            kept, attention_KN = _pruned(vlm, method, budget, args.pruner, inputs)
            count = sum(map_.numbers_hw.numel() for map_ in maps) if kept is None else len(kept)
            for row, map_ in zip(drawn, maps, strict=True):
                row.extend(_panels(row[0].image, map_, f"{method}, {count} tokens", kept, attention_KN))
            found.append({"method": method, "keep": budget, "tokens": count, "kept": kept})
        rows.extend(drawn)
    out.write_bytes(figures.kept_tokens(rows, width=2.3))
    grids = [list(map_.numbers_hw.shape) for map_ in maps]
    if args.json:
        common.print_json({"image": str(args.image), "out": str(out), "grids": grids, "methods": found})
    else:
        size = " and ".join(f"{high} x {wide}" for high, wide in grids)
        common.console().print(f"{out}: {len(found)} drawings on {size} tokens", soft_wrap=True)
    return 0


def _pruned(vlm: Any, method: str, keep: int | float, pruner: str | None, inputs: Any) -> tuple[list[int] | None, Any]:
    """Numbers of the kept tokens, and the attention of slots over all of them, if there are slots; None: all stay."""
    with pruned_vlm.pruned(vlm.model, method, keep, pruner) as handle:
        vlm.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        if handle is None:
            return None, None
        return [int(index) for index in handle.last_kept[0]], handle.slots(**inputs)[0]


def _under(image: Image.Image, map_: Any) -> Image.Image:
    from ocvtp import figures

    return image if map_.ratio is None else figures.padded(image, "pad", map_.ratio)


def _panels(image: Image.Image, map_: Any, title: str, kept: list[int] | None, attention_KN: Any) -> list[Any]:
    """The kept tokens of one map, and the segments of the slots there."""
    from ocvtp import figures

    places = {number: place for place, number in enumerate(map_.numbers_hw.flatten().tolist())}
    here = None if kept is None else [places[number] for number in kept if number in places]
    grid = tuple(map_.numbers_hw.shape)
    panels = [figures.Panel(image, here, grid, title)]
    if attention_KN is not None:
        slots = attention_KN[:, map_.numbers_hw.flatten().to(attention_KN.device)].float().cpu().numpy()
        panels.append(figures.Panel(image, here, grid, f"its {len(slots)} slots", slots=slots))
    return panels
