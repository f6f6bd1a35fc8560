"""Questions a second: in batches of 8 and 32 against one by one, and against lmms-eval's own model class for LLaVA.

    python benchmarks/evaluation.py --out benchmarks/results/evaluation-cpu-DATE.json     # some 2 minutes on two cores
    python benchmarks/evaluation.py --benchmarks all --questions 80
    python benchmarks/evaluation.py --quick      # few questions, to see that it runs

A VLM of LLaVA's family, unpruned, is asked the same questions about scenes by all of them, in turns within one run; of
several rounds the fastest counts. Each round decodes the images and prepares the prompts anew. lmms-eval's class
(`lmms_eval.models.chat.llava_hf`) takes one question at a time. `equal`: answers that are, letter by letter, those of
ocvtp one by one. `x least`: how many times as long as its matrix products alone (tower, projector, prefill; closed
form) take at the rate of a large one, which is measured in the same run. Needs ocvtp with lmms-eval, whose class
imports `decord` to read videos, of which there are none here: where that is not installed an empty module stands in.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import add_output, heading, machine, say

from ocvtp.data.question_sets import write_benchmarks
from ocvtp.efficiency.flops import prefill_flops
from ocvtp.efficiency.roofline import Ceilings
from ocvtp.efficiency.shapes import shape_of
from ocvtp.evaluation.ask import answers_to
from ocvtp.evaluation.benchmarks import benchmark, benchmarks
from ocvtp.evaluation.generate import Answerer, finish
from ocvtp.evaluation.lmms.official import Questions, opened
from ocvtp.evaluation.lmms.quiet import import_lmms_eval
from ocvtp.vlms import load, resolve

FOUR = ("gqa", "mme", "pope", "textvqa")
BATCHES = (1, 8, 32)
THEIRS = "lmms-eval's LlavaHf, one by one"
Ask = Callable[[Questions, Sequence[int]], list[str]]


def ours(vlm: Any, batch_size: int) -> Ask:
    def ask(questions: Questions, rows: Sequence[int]) -> list[str]:
        answerer = Answerer(vlm)  # which has prepared nothing yet
        answered, _ = answers_to(questions, answerer, rows, batch_size, None, None)
        return [one.answer.text for one in answered]

    return ask


def theirs(folder: Path, device: str) -> Ask:
    import_lmms_eval()
    sys.modules.setdefault("decord", SimpleNamespace(VideoReader=None, cpu=None))  # type: ignore[arg-type]
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.chat.llava_hf import LlavaHf

    model = LlavaHf(str(folder), device=device, device_map=device, dtype="float32", attn_implementation="sdpa")

    def ask(questions: Questions, rows: Sequence[int]) -> list[str]:
        task, name = questions.task, questions.benchmark.name
        # What a task does not say is 1024 there and 16 here; either is more than these answers take.
        model.task_dict[name] = {"test": task.eval_docs}
        requests = [
            Instance(
                request_type="generate_until",
                arguments=("", task.doc_to_messages, copy.deepcopy(questions.options), row, name, "test"),
                idx=0,
                metadata={"task": name, "doc_id": row, "repeats": 1},
            )
            for row in rows
        ]
        until = questions.options.get("until")
        return [finish(result.text, until) for result in model.generate_until(requests)]

    return ask


def operations(vlm: Any, questions: Questions, rows: Sequence[int]) -> int:
    """Of the matrix products of all prefills, one token of each answer included."""
    shape, tokens, total = shape_of(vlm.model.config), vlm.entry.tokens, 0
    for row in rows:
        batch = Answerer(vlm).prepare([questions.messages(row)])
        of_images = tokens * batch.images[0]
        text = int(batch.inputs["attention_mask"].sum()) - of_images
        total += prefill_flops(shape, image_tokens=of_images, text_tokens=text, causal=True).total
    return total


def measured(
    vlm: Any, name: str, data: Path, askers: Mapping[str, Ask], rounds: int, device: str, rate: float
) -> list[dict[str, Any]]:
    """Seconds of each for all questions of a benchmark."""
    with opened(benchmark(name), data) as questions:
        rows = range(len(questions))
        seconds: dict[str, list[float]] = {who: [] for who in askers}
        said: dict[str, list[str]] = {}
        least = operations(vlm, questions, rows) / rate
        for ask in askers.values():
            ask(questions, rows[:32])  # what only the first call costs
        for _ in range(rounds):
            for who, ask in askers.items():
                start = time.perf_counter()
                said[who] = ask(questions, rows)
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize()
                seconds[who].append(time.perf_counter() - start)
    first = next(iter(said.values()))
    return [
        {"benchmark": name, "who": who, "questions": len(rows), "seconds": min(taken), "least": least,
         "equal": sum(a == b for a, b in zip(said[who], first, strict=True))}
        for who, taken in seconds.items()
    ]  # fmt: skip


def summed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All benchmarks together: how fast each is, and how many times as fast as one by one and as lmms-eval's."""
    found = []
    for who in dict.fromkeys(row["who"] for row in rows):
        of_it = [row for row in rows if row["who"] == who]
        total = {key: sum(row[key] for row in of_it) for key in ("questions", "seconds", "least", "equal")}
        per_second, times_least = total["questions"] / total["seconds"], total["seconds"] / total["least"]
        found.append({"who": who, **total, "per_second": per_second, "times_least": times_least})
    for row in found:
        row["times_one_by_one"] = row["per_second"] / found[0]["per_second"]
        row["times_lmms_eval"] = row["per_second"] / found[-1]["per_second"]
    return found


def table(found: dict[str, Any]) -> str:
    columns = ("", "questions/s", "x one by one", "x lmms-eval's", "x least", "equal answers")
    lines = [heading(found["machine"]), "", f"| {' | '.join(columns)} |", "|:--|--:|--:|--:|--:|--:|"]
    for row in found["all"]:
        times = [row[f"times_{rival}"] for rival in ("one_by_one", "lmms_eval", "least")]
        speeds = " | ".join([f"{row['per_second']:.1f}", *(f"{time:.2f}" for time in times)])
        lines.append(f"| {row['who']} | {speeds} | {row['equal']} of {row['questions']} |")
    whos = [row["who"] for row in found["all"]]
    lines += ["", f"| questions/s | {' | '.join(whos)} |", f"|:--|{'--:|' * len(whos)}"]
    for name in dict.fromkeys(row["benchmark"] for row in found["rows"]):
        speeds = " | ".join(f"{r['questions'] / r['seconds']:.1f}" for r in found["rows"] if r["benchmark"] == name)
        lines.append(f"| {benchmark(name).label} | {speeds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="tiny-llava", help="of the catalogue, or a folder (default: tiny-llava)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--benchmarks", nargs="+", default=FOUR, help=f"or all (default: {' '.join(FOUR)})")
    parser.add_argument("--questions", type=int, default=160, help="of each benchmark (default: 160)")
    parser.add_argument("--rounds", type=int, default=2, help="of which the fastest counts (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one benchmark, 8 questions, one round")
    add_output(parser)
    arguments = parser.parse_args()
    names = (
        list(benchmarks())
        if list(arguments.benchmarks) == ["all"]
        else [benchmark(n).name for n in arguments.benchmarks]
    )
    rounds, count = arguments.rounds, arguments.questions
    if arguments.quick:
        names, rounds, count = names[:1], 1, 8
    vlm = load(arguments.vlm, device=arguments.device, dtype="float32")
    askers = {f"ocvtp, batches of {size}": ours(vlm, size) for size in BATCHES}
    askers[THEIRS] = theirs(resolve(arguments.vlm).folder, arguments.device)
    ceilings = Ceilings.measured(arguments.device, torch.float32)
    rows = []
    with tempfile.TemporaryDirectory(prefix="ocvtp-benchmark-") as folder:
        write_benchmarks(Path(folder), count, seed=0)
        for name in names:
            data = Path(folder) / f"{name}.parquet"
            rows += measured(vlm, name, data, askers, rounds, arguments.device, ceilings.flops)
    about = {"vlm": arguments.vlm, "dtype": "float32", "rounds": rounds, "ceilings": ceilings.as_dict()}
    say({"machine": machine(arguments.device), **about, "rows": rows, "all": summed(rows)}, table, arguments)


if __name__ == "__main__":
    main()
