"""The time that each method adds: the first token of an answer, against `random`, which does no more than drop tokens.

    python benchmarks/methods.py                 # on two CPU cores about fifteen minutes
    python benchmarks/methods.py --device cuda
    python benchmarks/methods.py --quick         # tiny-llava alone, few runs, to see that it runs

Methods inside the language model are compared with `vanilla`, which they shorten. Beside the time stand the
floating-point operations that choosing adds, in percent of those of the unpruned model's first token, as PyTorch counts
them (matrix products; eigenvalues and QR are not among them). All methods take turns within one
run, so that what else the machine does meets all of them. Needs ocvtp, torch and transformers.
"""

import argparse
from collections.abc import Collection
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
from ocvtp.efficiency.latency import measure
from ocvtp.errors import OcvtpError
from ocvtp.methods import REGISTRY
from ocvtp.vlms import resolve

TEXT = 32
RANDOM = "random-llava"
BUDGETS = ("11.1%", "33.3%")
"""The second for methods that cannot reach the first in a shallow language model."""


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
    model: Any, options: dict[str, dict[str, Any]], only: Collection[str]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """What makes each case, the budget of each, and why methods were left out."""
    made: dict[str, Any] = {"vanilla": lambda: ocvtp.prune(model, "vanilla")}
    budgets, left_out = {"vanilla": "100%"}, {}
    for name in REGISTRY:
        # oc-vtp computes what oc-vtp-untrained does, with other weights.
        if name in ("vanilla", "oc-vtp") or name not in {*only, "random"}:
            continue
        more = options.get(name, {})
        for budget in BUDGETS:
            try:
                ocvtp.prune(model, name, budget, **more).remove()
            except OcvtpError as error:
                left_out[name] = str(error)
                continue
            made[name], budgets[name] = (lambda n=name, b=budget, o=more: ocvtp.prune(model, n, b, **o)), budget
            left_out.pop(name, None)
            break
    # `random` at each budget that another has, to compare with.
    for budget in set(budgets.values()) - {"100%", budgets["random"]}:
        made[f"random {budget}"], budgets[f"random {budget}"] = (
            (lambda b=budget: ocvtp.prune(model, "random", b)),
            budget,
        )
    return made, budgets, left_out


def operations(model: Any, make: Any) -> int:
    """Of the first token after one prompt with one image."""
    with make(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.generate(**inputs(model, 1), max_new_tokens=1, do_sample=False)
    return counter.get_total_flops()


def rows(
    model: Any, batches: list[int], repeats: int, options: dict[str, dict[str, Any]], only: Collection[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    made, budgets, left_out = cases(model, options, only)
    found: dict[str, dict[str, Any]] = {name: {"method": name, "keep": budgets[name]} for name in made}
    flops = {name: operations(model, make) for name, make in made.items()}
    for batch in batches:
        times = measure(model, inputs(model, batch), made, new_tokens=1, repeats=repeats, warmup=1)
        took = {name: time.first_token.median for name, time in times.items()}
        for name, row in found.items():
            inside = name in REGISTRY and REGISTRY[name].acts == "inside the LLM"
            rival = "vanilla" if inside or name == "vanilla" else "random"
            if rival == "random" and budgets[name] != budgets["random"]:
                rival = f"random {budgets[name]}"
            row["against"] = rival
            if name != "vanilla" and not inside:
                row["added_flops"] = (flops[name] - flops[rival]) / flops["vanilla"]
            row[f"batch_{batch}"] = {"ms": took[name], "ratio": took[name] / took[rival]}
    return list(found.values()), left_out


def table(found: dict[str, Any]) -> str:
    lines = [heading(found["machine"])]
    for one in found["models"]:
        batches = [name.removeprefix("batch_") for name in one["rows"][0] if name.startswith("batch_")]
        head = "".join(f" batch {batch}, ms | ratio |" for batch in batches)
        size = f"{one['tokens']} tokens an image, {one['parameters'] / 1e6:.0f} M parameters"
        lines += ["", f"{one['model']}: {size}", "",
                  f"| method | kept | against |{head} FLOPs added |",
                  f"|:--|--:|:--|{'--:|--:|' * len(batches)}--:|"]  # fmt: skip
        for row in one["rows"]:
            times = [row[f"batch_{batch}"] for batch in batches]
            cells = "".join(f" {time['ms']:.1f} | {time['ratio']:.2f}x |" for time in times)
            added = f"{100 * row['added_flops']:.2f}%" if "added_flops" in row else ""
            lines.append(f"| {row['method']} | {row['keep']} | {row['against']} |{cells} {added} |")
        lines += [f"\nleft out: {name}: {why}" for name, why in one["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--methods", nargs="+", choices=list(REGISTRY), default=list(REGISTRY), help="default: all")
    parser.add_argument("--models", nargs="+", choices=["tiny-llava", RANDOM], default=["tiny-llava", RANDOM])
    parser.add_argument("--repeats", type=int, default=None, help="of each case (default: 20 of tiny-llava, else 5)")
    parser.add_argument("--quick", action="store_true", help="tiny-llava alone, few runs, to see that it runs")
    add_output(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = []
    for name in ["tiny-llava"] if arguments.quick else arguments.models:
        tiny, options = name == "tiny-llava", {}
        if tiny:
            model = AutoModelForImageTextToText.from_pretrained(resolve(name).folder, dtype=torch.float32)
        else:
            model = mid_size()
            options["trim"] = options["cdpruner"] = text_tower(model)
        model = model.eval().to(arguments.device)
        repeats = arguments.repeats or (5 if not tiny else 2 if arguments.quick else 20)
        made, left_out = rows(model, arguments.batches, repeats, options, arguments.methods)
        vision = model.config.vision_config
        found.append({
            "model": name,
            "tokens": (vision.image_size // vision.patch_size) ** 2,
            "parameters": sum(each.numel() for each in model.parameters()),
            "repeats": repeats,
            "rows": made,
            "left_out": left_out,
        })  # fmt: skip
    say({"machine": machine(arguments.device), "models": found}, table, arguments)


if __name__ == "__main__":
    main()
