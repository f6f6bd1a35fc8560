"""`ocvtp explain`: what a method lost, drawn for one question: the image, kept tokens and answers of runs."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ocvtp.commands import common
from ocvtp.errors import BadInput


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(subparsers, "explain", run, "draw the kept tokens and answers of runs for one question",
                        "A run is a folder of results/evaluate with samples.jsonl. Beside it the unpruned model, and "
                        "another method at the same budget; by default the one that answers most of what the run gets "
                        "wrong.")  # fmt: skip
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="results/evaluate/VLM/SETTING/BENCHMARK")
    parser.add_argument("--question", type=int, default=None, metavar="N",
                        help="doc_id; default: the first that only the unpruned model answers")  # fmt: skip
    parser.add_argument("--against", type=Path, default=None, metavar="RUN", help="the other run")
    parser.add_argument("--data", type=Path, default=Path("data/sample/benchmarks"),
                        help="the folder of question sets, BENCHMARK.parquet (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="the PNG to write (default: SETTING-qN.png, here)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read, draw and write."""
    from ocvtp.evaluation import traces

    one = traces.read(args.run_folder)
    unpruned = traces.unpruned(one)
    other = traces.read(args.against) if args.against is not None else traces.rival(one)
    number = traces.lost(one, unpruned) if args.question is None else args.question
    runs = [each for each in (unpruned, one, other) if each is not None]
    found = [each.sample(number) for each in runs]
    out = args.out or Path(f"{one.name}-q{number}.png")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{out} cannot be written: the folder {out.absolute().parent} does not exist")
    image = traces.image(args.data, one.benchmark, number)
    out.write_bytes(_drawn(image, runs, found))
    if args.json:
        common.print_json({
            "question": found[0]["question"], "doc_id": number, "answer": found[0]["answer"], "out": str(out),
            "runs": [_told(each.name, sample) for each, sample in zip(runs, found, strict=True)],
        })  # fmt: skip
        return 0
    console = common.console()
    console.print(f"Question {number}: {found[0]['question']}", soft_wrap=True, markup=False)
    console.print(f"Right: {found[0]['answer']}", soft_wrap=True, markup=False)
    for each, sample in zip(runs, found, strict=True):
        told = _told(each.name, sample)
        mark = "right" if told["score"] > 0 else "wrong"
        console.print(
            f"  {told['run']}: {told['prediction']} ({mark}, {told['tokens']} tokens)", soft_wrap=True, markup=False
        )
    console.print(f"drawn in {out}", soft_wrap=True, markup=False)
    return 0


def _told(name: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    kept = sample["kept"]
    count = kept if isinstance(kept, int) else sum(isinstance(n, int) or len(n) for n in kept)
    return {"run": name, "prediction": sample["prediction"], "score": sample["score"], "tokens": count, "kept": kept}


def _drawn(picture: Image.Image, runs: Sequence[Any], samples: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: the image, and for each run the tokens that stayed and the answer."""
    from ocvtp import figures
    from ocvtp.evaluation.traces import grid_of

    panels = [figures.Panel(picture, title=_short(samples[0]["question"], 48))]
    for run, sample in zip(runs, samples, strict=True):
        kept = sample["kept"]
        if isinstance(kept, list) and kept and isinstance(kept[0], list):
            kept = kept[0]  # of several images the first is drawn
        numbers = None if isinstance(kept, int) else [int(n) for n in kept]
        mark = "right" if sample["score"] > 0 else "wrong"
        title = f"{_short(run.name, 30)}: {_short(str(sample['prediction']), 16)} ({mark})"
        panels.append(figures.Panel(picture, numbers, grid_of(run), title, fit="pad"))
    return figures.kept_tokens([panels], width=2.6)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
