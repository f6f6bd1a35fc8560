"""`ocvtp latency`: time to the first token and to later ones, method by method."""

import argparse
from pathlib import Path
from typing import Any

from ocvtp.commands import common, pruned_vlm


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "latency", run, "measure how fast a pruned VLM answers",
        "Methods take turns, so that a slow minute of the machine hits all. Medians with quartiles.",
    )  # fmt: skip
    pruned_vlm.add_arguments(parser)
    parser.add_argument("--image", type=Path, default=None, help="an image (default: a synthetic scene)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of the answer (default: 16)")
    parser.add_argument("--repeats", type=int, default=10, help="measured runs of each method (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="runs before them (default: 2)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    image = pruned_vlm.read_image(args.image) if args.image else _scene()

    from ocvtp import vlms
    from ocvtp.efficiency.latency import measure

    vlm = vlms.load(args.vlm, device=pruned_vlm.device(args.device))
    cases: dict[str, Any] = {"vanilla": lambda: pruned_vlm.pruned(vlm, "vanilla", 1.0, None)}
    for keep in args.keep:
        for method in args.methods:
            if method != "vanilla":
                cases[f"{method}, keep {keep:g}"] = lambda m=method, k=keep: pruned_vlm.pruned(vlm, m, k, args.pruner)
    inputs = dict(pruned_vlm.inputs(vlm, image, args.prompt))
    times = measure(vlm.model, inputs, cases, new_tokens=args.new_tokens, repeats=args.repeats, warmup=args.warmup)
    if args.json:
        common.print_json({"vlm": args.vlm, "cases": {name: case.as_dict() for name, case in times.items()}})
        return 0
    numbers = ("first token", "of it vision", "next token", "answer", "of vanilla")
    device = next(iter(times.values())).device
    table = common.table(f"{args.vlm} on {device}: milliseconds, median [quartiles]", "", *numbers, right=numbers)
    whole = times["vanilla"].total.median
    for name, case in times.items():
        table.add_row(
            name,
            _spread(case.first_token),
            _spread(case.vision),
            _spread(case.next_token) if case.next_token else "-",
            _spread(case.total),
            f"{100 * case.total.median / whole:.0f}%",
        )
    common.console().print(table)
    return 0


def _scene() -> Any:
    from PIL import Image

    from ocvtp.data.scenes import make_scene

    return Image.fromarray(make_scene(0, "benchmark", 0).pixels_HW3)


def _spread(spread: Any) -> str:
    return f"{spread.median:.1f} [{spread.low:.1f}, {spread.high:.1f}]"
