"""Asks a VLM, pruned or not, in batches: chat messages in, answers and what was kept of each image out.

An answer does not depend on the batch that it is computed in: prompts are padded on the left, and what a method draws
depends on its seed and the image alone.
"""

import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ocvtp.errors import BadInput
from ocvtp.evaluation.answered import Answer, digest_of
from ocvtp.evaluation.benchmarks import NATIVE, Protocol
from ocvtp.vlms.conversations import OWN, Messages, authors, written


@dataclass(frozen=True)
class Prepared:
    """A batch of conversations as a VLM reads them.

    Attributes:
        inputs: what its processor made of them.
        images: of each conversation how many.
        digests: of each conversation's content.
    """

    inputs: Any
    images: list[int]
    digests: list[str]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(value.nbytes for value in self.inputs.values() if isinstance(value, torch.Tensor))


class PreparedMemory:
    """Batches that were prepared for one VLM, the ones used last: every method is asked the same questions.

    Args:
        limit: bytes to hold, about.
    """

    def __init__(self, limit: int = 256 * 2**20) -> None:
        self._limit, self._held = limit, 0
        self._found: OrderedDict[Hashable, Prepared] = OrderedDict()

    def get(self, key: Hashable, prepare: Callable[[], Prepared]) -> Prepared:
        """What stands under a key, or what `prepare` makes, which then stands there."""
        if key in self._found:
            self._found.move_to_end(key)
            return self._found[key]
        self._found[key] = made = prepare()
        self._held += made.nbytes
        while self._held > self._limit:
            self._held -= self._found.popitem(last=False)[1].nbytes
        return made


class Answerer:
    """A VLM ready to be asked.

    Args:
        vlm: as `ocvtp.vlms.loading.load` gives it.
        handle: of `ocvtp.prune` on the VLM's model; None if it is not pruned.
        max_new_tokens: of a question that does not say.
        prepared: batches that were prepared for this VLM before.
        protocol: native: asked by its own chat template; paper: by its authors', see `ocvtp.vlms.conversations`.
    """

    def __init__(
        self, vlm: Any, handle: Any = None, max_new_tokens: int = 16, prepared: PreparedMemory | None = None,
        protocol: Protocol = NATIVE,
    ) -> None:  # fmt: skip
        self.vlm, self.handle, self.max_new_tokens = vlm, handle, max_new_tokens
        self.conversation = OWN if protocol == NATIVE else authors(vlm.processor)
        self.prepared = prepared or PreparedMemory()
        vlm.processor.tokenizer.padding_side = "left"

    @property
    def device(self) -> torch.device:
        """Of the model."""
        where: torch.device = self.vlm.model.device
        return where

    @property
    def prompt_template(self) -> str:
        """What the model reads of a question about one image, `{question}` standing for the question."""
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{question}"}]}]
        return written(self.vlm.processor, question, self.conversation)

    def answer(self, conversations: Sequence[Messages], options: Mapping[str, Any] | None = None) -> list[Answer]:
        """Answers to a batch of conversations, in their order.

        Args:
            conversations: one batch; images are PIL under `image` or `url`.
            options: as lmms-eval's tasks give them: `max_new_tokens`, `until`, `do_sample`, `temperature`, `top_p`,
                `num_beams`. Others are for other models and mean nothing here.
        """
        return self.answer_prepared(self.prepare(conversations), options)

    def prepare(self, conversations: Sequence[Messages]) -> Prepared:
        """A batch of conversations as the VLM reads it, whatever method prunes it."""
        images = [self._images(messages) for messages in conversations]
        flat = [image for some in images for image in some]
        inputs = self.vlm.processor(
            text=[written(self.vlm.processor, messages, self.conversation) for messages in conversations],
            images=(images if self.vlm.family.nested else flat) if flat else None,
            padding=True,
            return_tensors="pt",
        )
        return Prepared(inputs, [len(some) for some in images], [digest_of(messages) for messages in conversations])

    def answer_prepared(self, batch: Prepared, options: Mapping[str, Any] | None = None) -> list[Answer]:
        """As `answer`, of what `prepare` made."""
        options = options or {}
        inputs = type(batch.inputs)(dict(batch.inputs)).to(self.device, dtype=self.vlm.model.dtype)
        with torch.inference_mode():
            sequences = self.vlm.model.generate(**inputs, **self._generation(options))
        new = sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.vlm.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        kept = self._kept(inputs, batch.images)
        lengths = inputs["attention_mask"].sum(1).tolist()
        made = (new != self._pad_id).sum(1).tolist()
        return [
            Answer(finish(text, options.get("until")), *rest)
            for text, *rest in zip(texts, kept, lengths, made, strict=True)
        ]

    @property
    def _pad_id(self) -> int:
        tokenizer = self.vlm.processor.tokenizer
        found: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return found

    def _generation(self, options: Mapping[str, Any]) -> dict[str, Any]:
        sample = bool(options.get("do_sample")) and float(options.get("temperature") or 1.0) > 0
        # A model's own generation config may ask for sampling; what is not asked for here is switched off.
        return {
            "max_new_tokens": int(options.get("max_new_tokens") or self.max_new_tokens),
            "num_beams": int(options.get("num_beams") or 1),
            "do_sample": sample,
            "temperature": float(options.get("temperature") or 1.0) if sample else None,
            "top_p": options.get("top_p") if sample else None,
            "top_k": None,
            "pad_token_id": self._pad_id,
        }

    def _images(self, messages: Messages) -> list[Image.Image]:
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        images = [part.get("image", part.get("url")) for part in parts if part["type"] == "image"]
        strange = next((image for image in images if not isinstance(image, Image.Image)), None)
        if strange is not None:
            raise BadInput(f"an image of a question is a {type(strange).__name__}; it must be a PIL image")
        return [self.vlm.family.prepare(self.vlm.processor, image) for image in images]

    def _kept(self, inputs: Mapping[str, Any], images_B: Sequence[int]) -> list[list[list[int]] | list[int]]:
        if self.handle is None:
            images = self.vlm.family.images(inputs)
            found: list[Any] = [] if images is None else self.vlm.family.counts(images)
        else:
            found = self.handle.last_kept
        if len(found) != sum(images_B):
            raise BadInput(
                f"{sum(images_B)} images became {len(found)} for the model, whose processor cuts them up: tell it not "
                "to, for what is kept is told image by image"
            )
        kept = iter(found)
        return [[next(kept) for _ in range(count)] for count in images_B]


def finish(text: str, until: Sequence[str] | str | None = None) -> str:
    """The answer as it is scored: cut at the first of `until`, without what scorers fail on, without outer space.

    That is control characters, which no spreadsheet takes, and halves of surrogate pairs, which no file does.
    """
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.split(stop)[0]
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")).strip()
