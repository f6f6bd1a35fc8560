"""The time that each method adds: the first token of an answer, against `random`, which does no more than drop tokens.

    python benchmarks/methods.py --out benchmarks/results/methods-cpu-DATE.json   # some 6 minutes on two cores
    python benchmarks/methods.py --device cuda
    python benchmarks/methods.py --quick         # tiny-llava alone, few runs, to see that it runs

tiny-llava at the budgets of its default grid, and a random LLaVA with the token count of LLaVA-1.5 at 11.1 %. Methods
inside the language model are compared with `vanilla`, which they shorten. `ratio` is the median of the ratios of each
turn. `own` is what a method's choice takes, in percent of the rival's time: less noisy than the ratio of two whole
times, and without what a longer or shorter prompt changes. Beside it stand the floating-point operations that choosing
adds at 11.1 %, in percent of those of the unpruned model's first token, as PyTorch counts them (matrix products;
eigenvalues and QR are not among them). All methods take turns within one run, so that what else the machine does meets
all of them. The report's leaderboard reads the newest file of that name. Needs ocvtp, torch and transformers.
"""

import argparse
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from typing import Any

import torch
from machine import add_output, heading, machine, say
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
)
from transformers import LlavaForConditionalGeneration as Llava

import ocvtp
from ocvtp.efficiency.latency import timed
from ocvtp.errors import OcvtpError
from ocvtp.methods import REGISTRY
from ocvtp.methods.register import AUTHORS
from ocvtp.vlms import resolve

TEXT = 32
RANDOM = "random-llava"
SHARE = "11.1%"
"""Of the random LLaVA, and where operations are counted."""
GRID = ("33.3%", "22.2%", SHARE, "5.6%", "2.8%")
"""48, 32, 16, 8 and 4 of tiny-llava's 144 tokens."""
UNTIMED = ("vanilla", "random", "oc-vtp")
"""The first two are there anyway; oc-vtp computes what oc-vtp-untrained does, with other weights."""
SETTLED = 2
"""Calls on a GPU after which a handle has recorded what later ones replay."""


def mid_size() -> Any:
    """A random LLaVA of 65 M parameters with the token count of LLaVA-1.5: 576 an image."""
    vision = CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4,
                              image_size=336, patch_size=14)  # fmt: skip
    text = LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
                       num_attention_heads=8, max_position_embeddings=4096, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    return Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, image_seq_length=576))


def text_tower(model: Any) -> dict[str, Any]:
    """What TRIM needs beside the model: a random CLIP, its text tower as large beside the vision tower as ViT-L's."""
    vision, count = model.config.vision_config, model.config.get_text_config().vocab_size
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(count)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token=f"w{count - 1}")
    width = vision.hidden_size * 3 // 4
    text = CLIPTextConfig(vocab_size=count, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12,
                          num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=count - 1)  # fmt: skip
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width))
    return {"clip": clip.eval().to(model.device, model.dtype), "clip_tokenizer": tokenizer, "tokenizer": tokenizer}


def inputs(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """One image a prompt, and a text of words without a meaning."""
    config = model.config
    side = config.vision_config.image_size
    count = (side // config.vision_config.patch_size) ** 2
    draws = torch.Generator().manual_seed(0)
    words = torch.randint(5, config.get_text_config().vocab_size, (batch, TEXT), generator=draws)
    words[words == config.image_token_id] = 5
    ids = torch.cat([words[:, :1], torch.full((batch, count), config.image_token_id), words[:, 1:]], 1)
    pixels = torch.randn(batch, 3, side, side, generator=draws)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in made.items()}


def cases(
    model: Any, budgets: Sequence[str], options: Mapping[str, dict[str, Any]], only: Collection[str]
) -> tuple[dict[tuple[str, str], Any], dict[str, str]]:
    """What makes each case, by method and budget, and why methods were left out at all of them."""
    made: dict[tuple[str, str], Any] = {("vanilla", "100%"): lambda: ocvtp.prune(model, "vanilla")}
    left_out: dict[str, str] = {}
    for name in ("random", *(name for name in REGISTRY if name in only and name not in UNTIMED)):
        more = options.get(name, {})
        for budget in budgets:
            try:
                ocvtp.prune(model, name, budget, **more).remove()
            except OcvtpError as error:
                left_out[name] = str(error)
                continue
            made[name, budget] = lambda n=name, b=budget, o=more: ocvtp.prune(model, n, b, **o)
    return made, {name: why for name, why in left_out.items() if not any(name == method for method, _ in made)}


def operations(model: Any, make: Any) -> int:
    """Of the first token after one prompt with one image."""
    with make(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        first_token(model, inputs(model, 1))
    return counter.get_total_flops()


def first_token(model: Any, given: Mapping[str, Any]) -> None:
    model.generate(**given, max_new_tokens=1, do_sample=False)


@dataclass(frozen=True)
class Took:
    """Milliseconds to the first token in each turn, and the least that choosing took of them."""

    turns_ms: list[float]
    own_ms: float


@torch.inference_mode()
def measured(
    model: Any, given: Mapping[str, Any], made: Mapping[tuple[str, str], Any], repeats: int
) -> dict[tuple[str, str], Took]:
    device = next(model.parameters()).device
    runs: dict[tuple[str, str], list[Mapping[str, float]]] = {case: [] for case in made}
    first_token(model, given)
    for _ in range(repeats):
        for case, make in made.items():
            with make():
                for _ in range(SETTLED if device.type == "cuda" else 0):
                    first_token(model, given)
                with timed(model, device) as phases:
                    first_token(model, given)
                runs[case].append(phases)
    return {
        case: Took(
            turns_ms=[1000 * sum(run.values()) for run in each], own_ms=1000 * min(run["method"] for run in each)
        )
        for case, each in runs.items()
    }


def rows(model: Any, batches: list[int], repeats: int, made: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    counted = {case: operations(model, make) for case, make in made.items() if case[1] in (SHARE, "100%")}
    whole = ("vanilla", "100%")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, budget in made:
        rival = ("random", budget) if REGISTRY[name].acts == "before the LLM" else whole
        row = {"method": name, "keep": budget, "against": rival[0]}
        if rival != whole and (name, budget) in counted:
            row["added_flops"] = (counted[name, budget] - counted[rival]) / counted[whole]
        found[name, budget] = row
    for batch in batches:
        took = measured(model, inputs(model, batch), made, repeats)
        for case, row in found.items():
            mine, its = took[case], took[row["against"], "100%" if row["against"] == "vanilla" else row["keep"]]
            row[f"batch_{batch}"] = {
                "ms": statistics.median(mine.turns_ms),
                "ratio": statistics.median(map(truediv, mine.turns_ms, its.turns_ms)),
                "own": (mine.own_ms - its.own_ms) / statistics.median(its.turns_ms),
            }
    return list(found.values())


def table(found: dict[str, Any]) -> str:
    lines = [heading(found["machine"])]
    for one in found["models"]:
        batches = [name.removeprefix("batch_") for name in one["rows"][0] if name.startswith("batch_")]
        head = "".join(f" batch {batch}, ms | ratio | own |" for batch in batches)
        size = f"{one['tokens']} tokens an image, {one['parameters'] / 1e6:.0f} M parameters"
        lines += ["", f"{one['model']}: {size}", "",
                  f"| method | kept | against |{head} FLOPs added |",
                  f"|:--|--:|:--|{'--:|--:|--:|' * len(batches)}--:|"]  # fmt: skip
        for row in one["rows"]:
            times = [row[f"batch_{batch}"] for batch in batches]
            cells = "".join(f" {time['ms']:.1f} | {time['ratio']:.2f}x | {100 * time['own']:.1f}% |" for time in times)
            added = f"{100 * row['added_flops']:.2f}%" if "added_flops" in row else ""
            lines.append(f"| {row['method']} | {row['keep']} | {row['against']} |{cells} {added} |")
        lines += [f"\nleft out: {name}: {why}" for name, why in one["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8], help="batch sizes (default: 8)")
    parser.add_argument("--methods", nargs="+", choices=list(REGISTRY), default=list(REGISTRY), help="default: all")
    parser.add_argument("--models", nargs="+", choices=["tiny-llava", RANDOM], default=["tiny-llava", RANDOM])
    parser.add_argument("--repeats", type=int, default=None, help="of each case (default: 6 of tiny-llava, else 3)")
    parser.add_argument("--quick", action="store_true", help="tiny-llava alone, one run at one budget")
    add_output(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = []
    for name in ["tiny-llava"] if arguments.quick else arguments.models:
        tiny, options, only = name == "tiny-llava", {}, arguments.methods
        if tiny:
            model = AutoModelForImageTextToText.from_pretrained(resolve(name).folder, dtype=torch.float32)
        else:
            model = mid_size()
            options["trim"] = options["cdpruner"] = text_tower(model)
            # What `-authors` keeps at a budget is another number, chosen in the same way.
            only = [method for method in only if not method.endswith(AUTHORS)]
        model = model.eval().to(arguments.device)
        repeats = arguments.repeats or (1 if arguments.quick else 6 if tiny else 3)
        budgets = GRID if tiny and not arguments.quick else (SHARE,)
        made, left_out = cases(model, budgets, options, only)
        vision = model.config.vision_config
        found.append({
            "model": name,
            "tokens": (vision.image_size // vision.patch_size) ** 2,
            "parameters": sum(each.numel() for each in model.parameters()),
            "repeats": repeats,
            "rows": rows(model, arguments.batches, repeats, made),
            "left_out": left_out,
        })  # fmt: skip
    say({"machine": machine(arguments.device), "models": found}, table, arguments)


if __name__ == "__main__":
    main()
