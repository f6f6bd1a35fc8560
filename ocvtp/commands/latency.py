"""`ocvtp latency`: time to the first token and to later ones, method by method."""

import argparse
from pathlib import Path
from typing import Any

from ocvtp.commands import common, pruned_vlm
from ocvtp.errors import BadInput


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "latency", run, "measure how fast a pruned VLM answers",
        "Methods take turns, so that a slow minute of the machine hits all. Medians with quartiles; phases of a first "
        "token from runs in which the device is waited for between them.",
    )  # fmt: skip
    pruned_vlm.add_arguments(parser)
    parser.add_argument("--random-weights", action="store_true", help="of a VLM of the catalogue: nothing is fetched, "
                        "and times are those of the real one; the image is noise")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="prompts at once, with --random-weights (default: 1)")
    parser.add_argument("--image", type=Path, default=None, help="an image (default: a synthetic scene)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of the answer (default: 16)")
    parser.add_argument("--repeats", type=int, default=10, help="measured runs of each method (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="runs before them (default: 2)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.batch != 1 and not args.random_weights:
        raise BadInput(f"--batch {args.batch} is of --random-weights: an image and a prompt are measured one at a time")
    if args.random_weights and args.image is not None:
        raise BadInput("--image says nothing to random weights: leave one of the two out")
    image = None if args.random_weights else pruned_vlm.read_image(args.image) if args.image else _scene()

    from ocvtp.efficiency.latency import measure

    model, inputs = _random(args) if image is None else _loaded(args, image)
    cases: dict[str, Any] = {"vanilla": lambda: pruned_vlm.pruned(model, "vanilla", 1.0, None)}
    for keep in args.keep:
        for method in args.methods:
            if method != "vanilla":
                cases[f"{method}, keep {keep:g}"] = lambda m=method, k=keep: pruned_vlm.pruned(model, m, k, args.pruner)
    times = measure(model, inputs, cases, new_tokens=args.new_tokens, repeats=args.repeats, warmup=args.warmup)
    if args.json:
        common.print_json({"vlm": args.vlm, "cases": {name: case.as_dict() for name, case in times.items()}})
        return 0
    for table in (_answers(args.vlm, times), _phases(times)):
        common.console().print(table)
    return 0


def _random(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from ocvtp.efficiency.random_vlm import random_inputs, random_vlm

    model = random_vlm(args.vlm, device=pruned_vlm.device(args.device))
    return model, dict(random_inputs(model, args.batch))


def _loaded(args: argparse.Namespace, image: Any) -> tuple[Any, dict[str, Any]]:
    from ocvtp import vlms

    vlm = vlms.load(args.vlm, device=pruned_vlm.device(args.device))
    return vlm.model, dict(pruned_vlm.inputs(vlm, image, args.prompt))


def _answers(name: str, times: dict[str, Any]) -> Any:
    numbers = ("first token", "next token", "answer", "of vanilla", "peak memory")
    device = next(iter(times.values())).device
    table = common.table(f"{name} on {device}: milliseconds, median [quartiles]", "", *numbers, right=numbers)
    whole = times["vanilla"].total.median
    for case, took in times.items():
        table.add_row(
            case,
            _spread(took.first_token),
            _spread(took.next_token) if took.next_token else "-",
            _spread(took.total),
            f"{100 * took.total.median / whole:.0f}%",
            "-" if took.peak_memory_bytes is None else f"{took.peak_memory_bytes / 1e9:.2f} GB",
        )
    return table


def _phases(times: dict[str, Any]) -> Any:
    phases = tuple(next(iter(times.values())).phases)
    table = common.table("Phases of a first token", "", *phases, right=phases)
    for case, took in times.items():
        table.add_row(case, *(_spread(took.phases[phase]) for phase in phases))
    return table


def _scene() -> Any:
    from PIL import Image

    from ocvtp.data.scenes import make_scene

    return Image.fromarray(make_scene(0, "benchmark", 0).pixels_HW3)


def _spread(spread: Any) -> str:
    return f"{spread.median:.1f} [{spread.low:.1f}, {spread.high:.1f}]"
