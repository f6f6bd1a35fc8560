"""What `show` and `latency` share: a VLM with an image and a prompt, pruned in one way or another."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from ocvtp.commands import common
from ocvtp.errors import BadInput

QUESTION = "What is in the image?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The VLM, how it is pruned, and what it is asked."""
    common.add_vlm(parser, "tiny-llava")
    parser.add_argument("--methods", "--method", type=common.words, default=["random"], metavar="A,B",
                        help="pruning methods (`ocvtp methods` lists them; default: random)")  # fmt: skip
    parser.add_argument("--keep", type=common.keep, nargs="+", default=[0.111], metavar="N",
                        help="tokens kept, as counts or shares (default: 11.1%%)")  # fmt: skip
    parser.add_argument("--pruner", default=None, help="folder or hub id of a trained pruner, for oc-vtp")
    parser.add_argument("--prompt", default=None, help=f"what is asked (default: {QUESTION!r})")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def device(asked: str | None) -> str:
    """The device asked for, or the best there is.

    Raises:
        BadInput: a device that this machine does not have.
    """
    import torch

    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    chosen = asked or (best.type if best else "cpu")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {chosen!r} cannot be used: {str(error).splitlines()[0]}") from error
    if torch.device(chosen).type == "meta":
        raise BadInput(f"device {chosen!r} cannot be used: its tensors have shapes and no numbers")
    return chosen


def read_image(path: Path) -> Image.Image:
    """The image in RGB, upright."""
    from ocvtp.data.decoding import open_image

    image: Image.Image = open_image(path)
    return image


def question(asked: str | None) -> str:
    """The prompt asked for, or the one that stands for it."""
    return QUESTION if asked is None else asked


def inputs(vlm: Any, image: Image.Image, prompt: str | None, times: int = 1) -> Any:
    """What the processor makes of one image and a prompt, as often as asked for, on the model's device."""
    content = [{"type": "image"}, {"type": "text", "text": question(prompt)}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[image] if vlm.family.nested else image] * times
    return vlm.processor(text=[text] * times, images=images, return_tensors="pt").to(vlm.model.device)


def pruned(
    model: Any, method: str, keep: int | float, pruner: str | None, **options: Any
) -> AbstractContextManager[Any]:
    """A model pruned by a method within a `with`, with options of the method; vanilla leaves it as it is.

    Raises:
        BadInput: `oc-vtp` without a trained pruner.
    """
    import ocvtp

    if method == "vanilla":
        return nullcontext()
    if method != "oc-vtp":
        handle: AbstractContextManager[Any] = ocvtp.prune(model, method=method, keep=keep, **options)
        return handle
    if pruner is None:
        raise BadInput(
            "oc-vtp needs a trained pruner: name its folder with --pruner, such as "
            "models/tiny-llava/layer_9-aw_mse-slots_16_32_48-seed_0 after `dvc repro`"
        )
    trained: AbstractContextManager[Any] = ocvtp.prune(model, method=method, keep=keep, pruner=pruner, **options)
    return trained
