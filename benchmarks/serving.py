"""Requests a second and time to the first token on a real vLLM, pruned and not.

    make serve-test                                       # makes the environment with vLLM
    .vllm-env/bin/python benchmarks/serving.py            # on two CPU cores about ten minutes
    .vllm-env/bin/python benchmarks/serving.py --quick    # tiny-llava and few requests, to see that it runs

Each case has an engine of its own, in a process of its own, one after the other. Its requests are different images, all
handed over at once; before them come others that nobody times. The time to the first token is that of one request at a
time. The default VLM is a random LLaVA of 65 M parameters with the 576 tokens an image of LLaVA-1.5.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import add_output, heading, machine, say

ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
ALONE = 5
"""Requests one at a time."""


def make_model(folder: Path) -> None:
    """The random LLaVA with a processor."""
    from methods import mid_size
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    model = mid_size()
    names = {number: f"w{number}" for number in range(model.config.text_config.vocab_size)} | {4: "<image>"}
    words = Tokenizer(WordLevel({name: number for number, name in names.items()}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", extra_special_tokens={"image_token": "<image>"}
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A VLM in a folder, and what it is asked."""

    model: str
    side: int
    """Pixels of its square images."""
    prompt: str


def tiny(folder: Path) -> Served:
    """tiny-llava."""
    from ocvtp.serving.export import export

    export("tiny-llava", folder)  # with the names that vLLM's own model looks for
    return Served(str(folder), 96, "USER: <image>\nWhat is in the image? ASSISTANT:")


def mid_size_llava(folder: Path) -> Served:
    """The random LLaVA; its words are numbers."""
    from ocvtp.serving.export import export

    with tempfile.TemporaryDirectory() as made:
        make_model(Path(made))
        export(made, folder)
    return Served(str(folder), 336, " ".join(["<image>", *(f"w{number}" for number in range(100, 132))]))


def measure(served: Served, section: dict[str, Any] | None, requests: int, new_tokens: int) -> dict[str, Any]:
    """One case, in this process."""
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = LLM(
        served.model, dtype="float32", enforce_eager=True, max_model_len=1024, limit_mm_per_prompt={"image": 1},
        max_num_seqs=32, hf_overrides={} if section is None else {"ocvtp": section}, seed=0,
    )  # fmt: skip
    draws = np.random.default_rng(0)

    def prompts(count: int) -> list[dict[str, Any]]:
        size = (served.side, served.side, 3)
        pictures = [Image.fromarray(draws.integers(0, 255, size, dtype=np.uint8)) for _ in range(count)]
        return [{"prompt": served.prompt, "multi_modal_data": {"image": picture}} for picture in pictures]

    def run(count: int, tokens: int) -> tuple[float, int]:
        batch = prompts(count)
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        answers = engine.generate(batch, how, use_tqdm=False)
        return time.perf_counter() - start, len(answers[0].prompt_token_ids)

    run(4, new_tokens)
    first = statistics.median(run(1, 1)[0] for _ in range(ALONE))
    seconds, read = run(requests, new_tokens)
    return {"prompt_tokens": read, "requests_per_second": requests / seconds, "first_token_ms": 1000 * first}


def apart(arguments: argparse.Namespace, served: Served, section: dict[str, Any] | None) -> dict[str, Any]:
    """One case, in a process of its own."""
    case = {"served": asdict(served), "section": section, "requests": arguments.requests,
            "new_tokens": arguments.new_tokens}  # fmt: skip
    with tempfile.NamedTemporaryFile("r", suffix=".json") as told:
        command = [sys.executable, __file__, "--case", json.dumps(case), "--out", told.name]
        done = subprocess.run(command, env={**os.environ, **ENGINE}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{section or 'vanilla'}: {done.stderr[-3000:]}")
        found: dict[str, Any] = json.load(told)
    return found


def table(found: dict[str, Any]) -> str:
    rows = [
        f"# Serving\n\n{heading(found['machine'])}; {found['requests']} requests of {found['new_tokens']} new tokens\n",
        "| | prompt tokens | requests/s | | first token | |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    whole = found["cases"]["vanilla"]
    for name, case in found["cases"].items():
        faster = case["requests_per_second"] / whole["requests_per_second"]
        sooner = case["first_token_ms"] / whole["first_token_ms"]
        rows.append(
            f"| {name} | {case['prompt_tokens']} | {case['requests_per_second']:.2f} | {faster:.2f}x "
            f"| {case['first_token_ms']:.0f} ms | {sooner:.2f}x |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--methods", default="random,css,oc-vtp-untrained", help="methods before the LLM")
    parser.add_argument("--keep", type=float, default=0.111, help="share of the tokens that stays (default: 0.111)")
    parser.add_argument("--quick", action="store_true", help="tiny-llava, few requests: to see that it runs")
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = json.loads(arguments.case)
        arguments.out.write_text(json.dumps(measure(Served(**case.pop("served")), **case)))
        return
    if arguments.quick:
        arguments.requests = min(arguments.requests, 4)
    import transformers
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        served = (tiny if arguments.quick else mid_size_llava)(Path(folder) / "served")
        sections: dict[str, dict[str, Any] | None] = {"vanilla": None}
        sections |= {name: {"method": name, "keep": arguments.keep} for name in arguments.methods.split(",")}
        cases = {name: apart(arguments, served, section) for name, section in sections.items()}
    found = {
        "machine": machine(vllm=vllm.__version__, transformers=transformers.__version__),
        "requests": arguments.requests, "new_tokens": arguments.new_tokens, "keep": arguments.keep, "cases": cases,
    }  # fmt: skip
    say(found, table, arguments)


if __name__ == "__main__":
    main()
