"""`ocvtp inspect`: what methods keep of one's own images, measured without a language model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ocvtp.commands import common, pruned_vlm
from ocvtp.errors import BadInput

_TITLES = {
    "cover": "objects with a kept token",
    "small": "small objects with one",
    "span": "unexplained, reference layer",
    "span_on": "unexplained, what goes on",
    "near": "distance to the nearest kept",
    "milliseconds": "milliseconds an image",
}


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "inspect", run, "measure what methods keep of images, without a language model",
        "cover, small: share of objects, and of small ones, with a kept token on their mask. span: share of the "
        "variance of all tokens that least squares on the kept ones leave unexplained, in the reference layer and in "
        "the one that goes on. near: mean cosine distance of a token to the nearest kept one. picks: tokens that "
        "slots attend to most. ms: median of the choice alone, an image; - of methods that work inside the tower.",
    )  # fmt: skip
    parser.add_argument("source", type=Path, help="a folder of images, or a COCO instances file with masks")
    parser.add_argument("--images", type=Path, default=None, help="where a COCO file's images are (default: beside it)")
    parser.add_argument("--vlm", default="tiny-llava", help="a VLM of the catalogue, or a folder (default: tiny-llava)")
    parser.add_argument("--tower", type=Path, default=None, help="instead of a VLM: the folder of a Dinov2Model, "
                        "CLIPVisionModel or SiglipVisionModel")  # fmt: skip
    parser.add_argument("--methods", type=common.words, default=["random", "qr", "css", "fps", "medoids",
                        "oc-vtp-untrained"], metavar="A,B@9",
                        help="pruning methods, each on its own layer or on that after @")  # fmt: skip
    parser.add_argument("--keep", type=common.keep, nargs="+", default=[0.111], metavar="N",
                        help="tokens kept, as counts or shares (default: 11.1%%)")  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="of methods that draw (default: 0)"
    )
    parser.add_argument("--layer", type=int, default=9, help="the reference layer (default: 9)")
    parser.add_argument("--pruner", default=None, help="folder or hub id of a trained pruner, for oc-vtp")
    parser.add_argument("--fit", choices=("pad", "squash", "crop"), default=None, help="how images become what the "
                        "tower wants (default: pad for a VLM, crop for a tower)")  # fmt: skip
    parser.add_argument("--limit", type=int, default=None, help="the first so many images")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once (default: 16)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=None, help="a PNG to draw the measures into")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print and draw."""
    from ocvtp.inspection.measure import Asked, measure, summary
    from ocvtp.inspection.segments import pictures

    if min(args.batch_size, 1 if args.limit is None else args.limit) < 1:
        raise BadInput(f"--batch-size {args.batch_size} and --limit {args.limit}: at least 1 each")
    if args.out is not None:
        common.writable("--out", args.out)
    asked = [Asked.parse(text, args.pruner) for text in args.methods]
    found = pictures(args.source, args.images, args.limit)
    subject = _subject(args)
    from rich.progress import Progress

    with Progress(console=common.console(), disable=args.json, transient=True) as bar:
        task = bar.add_task("images", total=len(found))
        rows = measure(
            subject, found, asked, args.keep, args.seeds, layer=args.layer, batch_size=args.batch_size,
            progress=lambda done, _: bar.update(task, completed=done),
        )  # fmt: skip
    means = list(summary(rows))
    if args.out is not None:
        common.write("--out", args.out, draw(means))
    if args.json:
        facts = {"images": len(found), "layer": args.layer, "fit": subject.fit, "rows": [row.to_dict() for row in rows]}
        common.print_json(facts)
    else:
        console = common.console()
        console.width = max(console.width, 100)  # a number that is cut off is none
        console.print(table(means, len(found), args.layer))
    return 0


def _subject(args: argparse.Namespace) -> Any:
    from ocvtp.inspection.measure import Subject

    device = pruned_vlm.device(args.device)
    if args.tower is not None:
        from ocvtp.inspection.towers import load as tower

        return Subject(tower(args.tower, device), None, args.fit or "crop")
    from ocvtp import vlms

    if args.fit == "crop":
        raise BadInput("--fit crop is for a tower: a VLM sees all of an image, pad or squash")
    vlm = vlms.load(args.vlm, device=device)
    return Subject(vlm.family, vlm.processor, args.fit or "pad")


def table(means: Sequence[Any], images: int, layer: int) -> Any:
    """What `ocvtp.inspection.measure.summary` says, as a table for the terminal."""
    numbers = ("seeds", "kept", "cover", "small", "span", "on", "near", "picks", "ms")
    title = f"{images} images; span of layer {layer}, on: of what goes on"
    table = common.table(title, "keep", "method", *numbers, right=("keep", *numbers))
    table.columns[1].no_wrap = True
    for row in means:
        table.add_row(
            str(row["keep"]), row["method"], str(row["seeds"]), f"{row['tokens']:.4g}",
            *(_short(row[name]) for name in ("cover", "small", "span", "span_on", "near")),
            f"{row['distinct']:.1f}", "-" if row["milliseconds"] is None else f"{row['milliseconds']:.2f}",
        )  # fmt: skip
    return table


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(means: Sequence[Any]) -> bytes:
    """Each measure against tokens kept, a line a method."""
    from ocvtp import figures

    panels = []
    for name, title in _TITLES.items():
        lines = []
        for method in dict.fromkeys(row["method"] for row in means):
            known = [row for row in means if row["method"] == method and row[name] is not None]
            points = sorted((row["tokens"], row[name]) for row in known)
            if points:
                lines.append(figures.Series(method, [x for x, _ in points], [y for _, y in points]))
        panels.append((title, lines))
    return figures.curves(panels, xlabel="tokens kept of an image")
