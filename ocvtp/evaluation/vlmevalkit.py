"""Our model for VLMEvalKit: a VLM, pruned or not, that answers its messages. The package itself is not needed.

A model is a factory in VLMEvalKit's table of models:

    from functools import partial
    from vlmeval.config import supported_VLM
    from ocvtp.evaluation.vlmevalkit import OcvtpVLM

    supported_VLM["llava-css-64"] = partial(OcvtpVLM, "llava-1.5-7b", "css", 64, dtype="float16", device="cuda")
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from ocvtp.data.decoding import open_image
from ocvtp.errors import BadInput
from ocvtp.evaluation.benchmarks import NATIVE, checked
from ocvtp.evaluation.setting import EvaluationSetting, ready
from ocvtp.vlms.conversations import Messages

Item = Mapping[str, Any]
"""A part of a message: its `type`, text or image, and its `value`, the text or the image's path."""


class OcvtpVLM:
    """What VLMEvalKit asks of a model: `generate`, and that datasets make the prompts.

    Args:
        vlm: name in ocvtp's catalogue, or a folder.
        method: as `ocvtp methods` lists.
        keep: tokens an image, a share in (0, 1], or a percentage such as 11.1%.
        pruner: folder of a trained pruner.
        seed: of methods with randomness.
        dtype: float32, bfloat16 or float16.
        device: cpu, cuda, ...
        max_new_tokens: of an answer.
        protocol: paper: asked by the template of the VLM's authors; native: by its own.
        options: of the method, such as top_k=2.
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")
    is_api = False

    def __init__(
        self,
        vlm: str = "tiny-llava",
        method: str = "vanilla",
        keep: int | float | str | None = None,
        pruner: str | None = None,
        seed: int = 0,
        dtype: str = "float32",
        device: str = "cpu",
        max_new_tokens: int = 512,
        protocol: str = NATIVE,
        **options: Any,
    ) -> None:
        setting = EvaluationSetting(
            vlm, method, keep, seed, pruner, options, dtype, 1, max_new_tokens, checked(protocol)
        )
        self._stack = ExitStack()  # a model of its own stays pruned for as long as this object lives
        self.answerer = self._stack.enter_context(ready(setting, device, shared=False))

    def generate(self, message: str | Item | Sequence[str | Item], dataset: str | None = None) -> str:
        """The answer to a message.

        Args:
            message: a text, a part, or a list of these: `[{"type": "image", "value": "a.jpg"}, {"type": "text", ...}]`.
                A string in a list that is the path of an image is that image. A part may have a `role`; without, it is
                the user's.
            dataset: its name; an answer does not depend on it.

        Raises:
            BadInput: a part is no such thing, or of another type than text and image, or an image cannot be read.
        """
        return self.answerer.answer([conversation(message)])[0].text

    def use_custom_prompt(self, dataset: str) -> bool:
        """No: a dataset makes its prompts itself, the same for every model."""
        return False

    def set_dump_image(self, dump_image: Any) -> None:
        """What VLMEvalKit offers to models that make prompts themselves: not needed."""


def conversation(message: str | Item | Sequence[str | Item]) -> Messages:
    """A message of VLMEvalKit as chat messages, its images decoded."""
    parts = [message] if isinstance(message, str | Mapping) else message
    items = [{"type": "text", "value": message}] if isinstance(message, str) else [_item(part) for part in parts]
    if not items:
        raise BadInput("a message without any part: text and images are needed")
    turns = groupby(items, key=lambda item: item.get("role", "user"))
    return [{"role": role, "content": [_part(item) for item in some]} for role, some in turns]


def _item(part: str | Item) -> Item:
    if isinstance(part, str):
        is_image = (guess_type(part)[0] or "").startswith("image/") and _is_file(part)
        return {"type": "image" if is_image else "text", "value": part}
    if not isinstance(part, Mapping) or not {"type", "value"} <= set(part):
        raise BadInput(f"a part of a message is {part!r}: a mapping with type and value is needed")
    return part


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a text longer than any name of a file, say
        return False


def _part(item: Item) -> dict[str, Any]:
    kind, value = item["type"], item["value"]
    if kind not in OcvtpVLM.allowed_types:
        raise BadInput(
            f"a part of a message is of type {kind!r}; {' and '.join(OcvtpVLM.allowed_types)} can be answered"
        )
    if kind == "text":
        return {"type": "text", "text": str(value)}
    return {"type": "image", "image": open_image(value)}
