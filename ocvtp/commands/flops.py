"""`ocvtp flops`: what a prefill costs, by the paper's formula and in truth."""

import argparse
from typing import Any

from ocvtp.commands import common
from ocvtp.errors import BadInput

_WHOLE = {
    "llava-1.5-7b": 576,
    "llava-1.5-13b": 576,
    "llava-next-7b": 2880,
    "qwen2.5-vl-3b": 999,
    "qwen2.5-vl-7b": 999,
    "qwen3-vl-4b": 744,
    "qwen3-vl-8b": 744,
}
"""Tokens of an image unless given: fixed for LLaVA; for Qwen those of a photograph of about 1000 x 780, at one for
28 x 28 pixels and for 32 x 32."""
_SHARES = (0.333, 0.222, 0.111)
_PROMPTS, _SAMPLES = 2, 4
_PAPER_LEAVES_OUT = (
    "The paper counts the language model alone, with two matrices in its MLP, where a gated one has three, and without "
    "lm_head; tower and projector are left out. Its pruner has 64 slots, whatever is kept, and operations on single "
    "elements count."
)


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "flops", run, "count the operations of a prefill",
        "Closed forms; nothing is loaded or run. A multiply-accumulate counts as two operations.",
    )  # fmt: skip
    common.add_vlm(parser, "llava-1.5-7b")
    parser.add_argument("--keep", type=common.keep, nargs="+", default=None, metavar="N",
                        help="tokens kept, as counts or shares (default: 33.3%% 22.2%% 11.1%%)")  # fmt: skip
    parser.add_argument("--image-tokens", type=int, default=None, help="vision tokens of the unpruned image")
    parser.add_argument("--text-tokens", type=int, default=32, help="text tokens of the prompt (default: 32)")
    parser.add_argument("--slots", type=int, default=None, help="slots of the pruner (default: as many as are kept)")
    parser.add_argument("--inside-tower", type=int, default=None, metavar="LAYER", help="from this layer of the tower "
                        "on the kept tokens are alone in it, as with inside_tower=True of css and others")  # fmt: skip
    parser.add_argument("--convention", choices=("both", "paper", "true"), default=None,
                        help="paper: as its Table 4 counts, beside the truth; true: all parts "
                        "(default: both)")  # fmt: skip
    parser.add_argument("--answers", type=int, default=None, metavar="IMAGES", help="instead: what a step of a "
                        "training with loss=answers costs on so many images")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=None, help="with --answers: prompts of an image (default: 2)")
    parser.add_argument("--samples", type=int, default=None, help="with --answers: kept sets of an image in a step "
                        "(default: 4); 0: answers_gradient=straight_through")  # fmt: skip
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Count and print; `BadInput` for an option that says nothing to what is asked."""
    of_answers = {"--prompts": args.prompts, "--samples": args.samples}
    of_prefill = {"--slots": args.slots, "--inside-tower": args.inside_tower, "--convention": args.convention}
    for option, given in (of_prefill if args.answers is not None else of_answers).items():
        if given is not None:
            other = "with --answers" if args.answers is not None else "without --answers"
            raise BadInput(f"{option} says nothing {other}: leave it out")
    if args.answers is not None:
        return _answers(args)
    rows = count(args.vlm, args.keep, args.image_tokens, args.text_tokens, args.slots, args.inside_tower)
    if args.json:
        common.print_json({"vlm": args.vlm, "text_tokens": args.text_tokens, "rows": rows})
        return 0
    if args.convention == "paper":
        common.console().print(_as_the_paper(args.vlm, rows))
        common.console().print(_PAPER_LEAVES_OUT)
        return 0
    common.console().print(_in_truth(args.vlm, rows, paper=args.convention != "true"))
    return 0


def _as_the_paper(vlm: str, rows: list[dict[str, Any]]) -> Any:
    """The numbers of Table 4, and what the same parts cost in truth."""
    numbers = ("tokens", "LLM", "in truth", "", "pruner", "in truth ", " ")
    table = common.table(f"Operations of a prefill of {vlm} as the paper counts them", *numbers, right=numbers)
    for row in rows:
        llm = _beside(row["paper_flops"], row["flops"]["llm"], "T", 1e12)
        pruner = _beside(row["paper_pruner_flops"], row["flops"]["pruner"], "G", 1e9)
        table.add_row(str(row["tokens"]), *llm, *pruner)
    return table


def _beside(paper: float, true: float, unit: str, size: float) -> tuple[str, str, str]:
    """The paper's number, the true one, and how much more that is; dashes for nothing."""
    if not paper:
        return "-", "-", ""
    return f"{paper / size:.2f}{unit}", f"{true / size:.2f}{unit}", f"{100 * (true / paper - 1):+.0f}%"


def _in_truth(vlm: str, rows: list[dict[str, Any]], *, paper: bool) -> Any:
    """Every part; if asked for, beside the paper's count."""
    parts = ("tower", "projector", "pruner", "llm", "lm_head", "total")
    numbers = ("tokens", *(["paper"] if paper else []), "tower", "project", "pruner", "LLM", "head", "all", "%",
               "KV cache")  # fmt: skip
    title = f"Operations of a prefill of {vlm}" + ("; `paper` by the paper's formula" if paper else "")
    table = common.table(title, *numbers, right=numbers)
    whole = rows[0]["flops"]["total"]
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            *([_short(row["paper_flops"])] if paper else []),
            *(_short(row["flops"][part]) for part in parts),
            f"{100 * row['flops']['total'] / whole:.1f}",
            f"{_short(row['kv_cache_bytes'])}B",
        )
    return table


def _answers(args: argparse.Namespace) -> int:
    """Print what a step of a training with the loss `answers` costs."""
    from ocvtp.efficiency.teaching import teaching

    shape, whole = shape_of(args.vlm), _whole(args.vlm, args.image_tokens)
    prompts = _PROMPTS if args.prompts is None else args.prompts
    samples = _SAMPLES if args.samples is None else args.samples
    budgets = _budgets(args.keep, whole)
    rows = [
        {"tokens": kept, **teaching(shape, image_tokens=whole, kept=kept, images=args.answers, prompts=prompts,
                                    text_tokens=args.text_tokens, samples=samples).as_dict()}
        for kept in budgets
    ]  # fmt: skip
    if args.json:
        common.print_json(
            {"vlm": args.vlm, "images": args.answers, "prompts": prompts, "samples": samples, "rows": rows}
        )
        return 0
    operations, memory = ("teacher", "student", "pruner", "total"), ("weights", "student", "held")
    columns = ("tokens", *operations, *(f"{name} memory" for name in memory))
    table = common.table(
        f"Operations of a step of loss=answers with {args.vlm}: {args.answers} images, {prompts} prompts each; "
        "memory of the weights in 16 bits, of the way back, and of what is held an image", *columns, right=columns,
    )  # fmt: skip
    for row in rows:
        sizes = (row[f"{name}_bytes"] for name in memory)
        table.add_row(str(row["tokens"]), *(_short(row[part]) for part in operations),
                      *(f"{_short(size)}B" for size in sizes))  # fmt: skip
    common.console().print(table)
    return 0


def _whole(vlm: str, image_tokens: int | None) -> int:
    """Tokens of an image."""
    if image_tokens is not None:
        if image_tokens < 1:
            raise BadInput(f"--image-tokens is {image_tokens}: at least 1 is needed")
        return image_tokens
    whole: int | None = _WHOLE.get(vlm) or shape_of(vlm).tower.tokens_per_tile
    if whole is None:
        raise BadInput(f"{vlm} has images of many sizes: say how many tokens with --image-tokens")
    return whole


def _budgets(keep: list[int | float] | None, whole: int) -> list[int]:
    """Tokens that stay, by default at the paper's shares."""
    from ocvtp.methods import Budget

    return [Budget.parse(budget).tokens(whole) for budget in (_SHARES if keep is None else keep)]


def count(
    vlm: str, keep: list[int | float] | None, image_tokens: int | None, text_tokens: int, slots: int | None,
    inside_tower: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for the whole image and one for each budget."""
    from ocvtp.efficiency.flops import (
        PAPER_SLOTS,
        kv_cache_bytes,
        paper_llm_flops,
        paper_pruner_flops,
        prefill_flops,
        pruner_flops,
    )

    shape, whole = shape_of(vlm), _whole(vlm, image_tokens)
    if slots is not None and slots < 1:
        raise BadInput(f"--slots is {slots}: at least 1 is needed")
    budgets = _budgets(keep, whole)
    rows = []
    for tokens in (None, *budgets):
        kept = whole if tokens is None else tokens
        width = shape.tower.width
        pruner = 0 if tokens is None else pruner_flops(whole, width, tokens if slots is None else slots)
        paper_pruner = (
            0 if tokens is None else paper_pruner_flops(whole, width, PAPER_SLOTS if slots is None else slots)
        )
        flops = prefill_flops(
            shape, image_tokens=whole, kept=kept, text_tokens=text_tokens, pruner=pruner,
            inside_tower=None if tokens is None else inside_tower,
        )  # fmt: skip
        llm = shape.llm
        rows.append({
            "tokens": kept,
            "share": kept / whole,
            "paper_flops": paper_llm_flops(kept + text_tokens, width=llm.width, layers=llm.layers, mlp=llm.mlp),
            "paper_pruner_flops": paper_pruner,
            "flops": flops.as_dict(),
            "kv_cache_bytes": kv_cache_bytes(llm, kept + text_tokens),
        })  # fmt: skip
    return rows


def _short(number: float) -> str:
    """Four places: `6.314T`, `366.0G`; a dash for nothing."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{max(0, 3 - len(str(int(number / size))) + 1)}f}{unit}"
    return f"{number:.0f}" if number else "-"


def shape_of(vlm: str) -> Any:
    """The shape of a VLM of the catalogue or of a folder."""
    from ocvtp.efficiency import shapes

    return shapes.known_shape(vlm) if vlm in shapes.KNOWN else shapes.shape_of(shapes.config_in_files(vlm))
