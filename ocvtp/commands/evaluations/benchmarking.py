"""`ocvtp eval`: one's own model on benchmarks, without the pipeline; what was answered is kept through a kill."""

import argparse
import hashlib
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from ocvtp.commands import common, pruned_vlm
from ocvtp.commands.evaluations.table_of_results import cell
from ocvtp.errors import BadInput, OcvtpError

JOURNAL = "journal"


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "eval", run, "evaluate a VLM, pruned or not, on benchmarks",
        "The same code as stage `evaluate`. Results go to OUT/SETTING/BENCHMARK, where `ocvtp results OUT` and "
        "`ocvtp explain` read them; run again, it asks what was not answered yet.",
    )  # fmt: skip
    common.add_vlm(parser, "tiny-llava")
    parser.add_argument("--method", default="vanilla", help="a pruning method (default: vanilla, which prunes nothing)")
    parser.add_argument("--keep", type=common.keep, default=None, metavar="N", help="tokens kept, a count or a share")
    parser.add_argument("--pruner", default=None, help="folder of a trained pruner, for oc-vtp")
    parser.add_argument("--seed", type=int, default=None, help="of methods that draw (default: 0)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="options of the method, top_k=2"
    )
    parser.add_argument("--benchmark", "--benchmarks", type=common.words, default=["pope"], metavar="A,B",
                        help="benchmarks, or all (default: pope)")  # fmt: skip
    parser.add_argument("--data", type=Path, default=None, metavar="FOLDER",
                        help="with BENCHMARK.parquet of each (default: the official sets)")  # fmt: skip
    parser.add_argument("--limit", type=int, default=None, help="the first so many questions of each")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at once (default: 8)")
    parser.add_argument("--protocol", default="native",
                        help="native, or paper: as its authors ask and score (docs/evaluation.md)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=16, help="where a benchmark does not say (default: 16)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--out", type=Path, default=Path("evaluations"), help="folder of results (default: evaluations)"
    )
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, score, write and print; a benchmark that fails, whatever by, takes no other with it."""
    from rich.progress import Progress

    from ocvtp.evaluation.benchmarks import benchmark, benchmarks
    from ocvtp.evaluation.evaluate import EvaluationSetting, evaluate

    names = list(benchmarks()) if args.benchmark == ["all"] else [benchmark(name).name for name in args.benchmark]
    options = common.named_values("--set", args.set, "top_k=2")
    setting = EvaluationSetting(
        args.vlm, args.method, args.keep, args.seed, args.pruner, options, args.dtype, args.batch_size,
        args.max_new_tokens, args.protocol,
    )  # fmt: skip
    device, rows, failed = pruned_vlm.device(args.device), [], []
    place = args.out / folder_of(setting)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {args.out}: no results can be written there: {error}") from error
    with Progress(console=common.console(), disable=args.json, transient=True) as bar:
        for name in names:
            heard, out = partial(_heard, bar, bar.add_task(name, total=None)), place / name
            try:
                score = evaluate(
                    setting, name, args.data, out, limit=args.limit, device=device, journal=out / JOURNAL,
                    progress=heard,
                )  # fmt: skip
            except Exception as error:
                failed.append(error)
                said = str(error) if isinstance(error, OcvtpError) else f"{type(error).__name__}: {error}"
                sys.stderr.write(f"ocvtp: {name}: {said}\n")
                if os.environ.get("OCVTP_TRACEBACK"):
                    traceback.print_exception(error)
                continue
            rows.append({key: score[key] for key in ("benchmark", "score", "scale", "n")} | {
                "kept": score["tokens_kept"]["mean"], "path": str(out),
            })  # fmt: skip
    if not rows:  # all were told already
        return 2 if isinstance(failed[0], BadInput) else 1
    if args.json:
        common.print_json({"setting": place.name, "rows": rows, "failed": [str(error) for error in failed]})
    else:
        table = common.table(place.name, "benchmark", "score", "scale", "questions", "tokens an image",
                             right=("score", "questions", "tokens an image"))  # fmt: skip
        for row in rows:
            table.add_row(*(cell(row[key]) for key in ("benchmark", "score", "scale", "n", "kept")))
        common.console().print(table)
    return 1 if failed else 0


def _heard(bar: Any, task: Any, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def folder_of(setting: Any) -> str:
    """A folder name that tells settings apart."""
    said = {"vlm": setting.vlm, "pruner": str(setting.pruner), "options": dict(setting.options), "dtype": setting.dtype,
            "max_new_tokens": setting.max_new_tokens, "protocol": setting.protocol}  # fmt: skip
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
    parts = [Path(setting.vlm).name, setting.method, setting.keep, setting.seed, digest]
    return "-".join(str(part).replace("/", "-") for part in parts if part is not None)
