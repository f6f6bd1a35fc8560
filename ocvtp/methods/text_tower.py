"""The text tower of the CLIP that a VLM's vision tower was trained with, for methods that compare tokens with words.

It comes from `clip` (a `CLIPModel`, or its folder or hub id; the catalogue names one for the VLMs that were built on
it), for LLaVA models hold none. The prompt is read back with the VLM's tokenizer (`tokenizer`), and the question cut
out of it by the regular expression `question`: its last match, in which the group that is not empty is the question;
without a match it is all of the prompt.

Letters: G images of a group, N tokens of an image, C tower width, P width of CLIP's common space, Q pieces of text.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible, NotAvailable
from ocvtp.vlms.family import Family

QUESTION = r"(?s)USER:\s*(.*?)\s*(?:ASSISTANT:|$)|\[INST\]\s*(.*?)\s*\[/INST\]"
"""The question in prompts in the form of Vicuna and of Mistral."""
OPTIONS: Mapping[str, Any] = {"clip": None, "clip_tokenizer": None, "tokenizer": None, "question": QUESTION}
"""Of methods that have a text tower."""


class TextTower:
    """Questions and image tokens in CLIP's common space."""

    def __init__(self, clip: Any, clip_tokenizer: Any, tokenizer: Any, question: str = QUESTION) -> None:
        """`clip` is a `CLIPModel`; `tokenizer` reads prompts back, `clip_tokenizer` makes what the text tower reads."""
        vision = clip.vision_model
        self._image = torch.nn.Sequential(vision.post_layernorm, clip.visual_projection)
        self._text, self._text_projection = clip.text_model, clip.text_projection
        self._length = clip.config.text_config.max_position_embeddings
        self._clip_tokenizer, self._tokenizer = clip_tokenizer, tokenizer
        self._question = re.compile(question)

    def tokens(self, tokens_GNC: Tensor) -> Tensor:
        """Image tokens in the common space, [G, N, P] float32."""
        self._to(tokens_GNC.device)
        image_GNP: Tensor = self._image(tokens_GNC.to(self._text_projection.weight.dtype)).float()
        return image_GNP

    def questions(self, prompts: Sequence[list[int]]) -> list[str]:
        """The question in each prompt, given the token ids of the prompts."""
        texts = self._tokenizer.batch_decode(prompts, skip_special_tokens=True)
        return [self._asked(text) for text in texts]

    def _asked(self, text: str) -> str:
        matches = list(self._question.finditer(text))
        if not matches:
            return text.strip()
        return next((group for group in matches[-1].groups() if group), "").strip()

    def embed(self, questions: Sequence[str], device: torch.device) -> Tensor:
        """Each question in the common space, [G, P] float32; what is longer than the text tower reads is cut off."""
        self._to(device)
        distinct = list(dict.fromkeys(questions))
        inputs = self._clip_tokenizer(
            distinct, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(device)
        text_QP = self._read(inputs.input_ids, inputs.attention_mask)
        text_GP: Tensor = text_QP[[distinct.index(question) for question in questions]]
        return text_GP

    def embed_whole(self, questions: Sequence[str], device: torch.device) -> Tensor:
        """As `embed`, but long questions are read in pieces: the mean of the pieces at unit length, [G, P] float32."""
        self._to(device)
        found: dict[str, Tensor] = {}
        for question in dict.fromkeys(questions):
            words = self._clip_tokenizer(question, add_special_tokens=False).input_ids
            whole = self._clip_tokenizer(question).input_ids
            # What comes before and after the words, such as CLIP's tokens for start and end.
            start = next(at for at in range(len(whole) + 1) if whole[at : at + len(words)] == words)
            before, after = whole[:start], whole[start + len(words) :]
            room = self._length - len(before) - len(after)
            cut = [words[at : at + room] for at in range(0, len(words), room)] or [[]]
            pieces = [[*before, *each, *after] for each in cut]
            rows = [self._read(torch.tensor([each], device=device), None)[0] for each in pieces]
            found[question] = torch.nn.functional.normalize(torch.stack(rows), dim=1).mean(0)
        return torch.stack([found[question] for question in questions])

    def _read(self, ids_QL: Tensor, mask_QL: Tensor | None) -> Tensor:
        ended_QC = self._text(input_ids=ids_QL, attention_mask=mask_QL).pooler_output
        text_QP: Tensor = self._text_projection(ended_QC).float()
        return text_QP

    def _to(self, device: torch.device) -> None:
        if self._text_projection.weight.device != device:
            for module in (self._image, self._text, self._text_projection):
                module.to(device)


def text_tower(name: str, family: Family, options: Mapping[str, Any]) -> TextTower:
    """The text tower that options (`OPTIONS`) and the catalogue name, for a method of that name.

    Raises:
        BadInput: a regular expression that is none, or a tokenizer that is not given.
        Incompatible: the VLM's tower is no CLIP, or has another width.
        NotAvailable: no text tower is named, or it is not on this machine.
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        re.compile(options["question"])
    except (re.error, TypeError) as error:
        raise BadInput(
            f"{name} has no question={options['question']!r}: a regular expression is needed: {error}"
        ) from error
    if not family.facts.cls:
        raise Incompatible(
            f"{name} needs a CLIP tower, whose text tower reads the question: this VLM has another tower"
        )
    clip, clip_tokenizer = options["clip"] or _named(name, family), options["clip_tokenizer"]
    if not isinstance(clip, CLIPModel):
        clip_tokenizer = clip_tokenizer or clip
        clip = _loaded(CLIPModel, clip, "a CLIPModel", dtype=torch.float32)
    if clip_tokenizer is None:
        raise BadInput(f"{name} needs clip_tokenizer: the tokenizer of the CLIPModel, or its folder")
    width = clip.config.vision_config.hidden_size
    if width != family.facts.width:
        raise Incompatible(
            f"the vision tower that clip was trained with has width {width}, but that of the VLM {family.facts.width}"
        )
    tokenizer = options["tokenizer"] or _own_folder(name, family)
    clip_tokenizer, tokenizer = (
        each if callable(each) else _loaded(AutoTokenizer, each, "a tokenizer") for each in (clip_tokenizer, tokenizer)
    )
    return TextTower(clip.eval(), clip_tokenizer, tokenizer, options["question"])


def _named(name: str, family: Family) -> str:
    """The CLIP that the catalogue names for this VLM."""
    entry = getattr(family.model, "ocvtp_entry", None)
    named = None if entry is None else entry.text_tower
    if named is None:
        raise NotAvailable(
            f"{'this VLM' if entry is None else entry.name} has no text tower, and {name} needs that of the CLIP "
            "which its vision tower was trained with: give clip=FOLDER, a hub id, or a CLIPModel"
        )
    return str(named)


def _own_folder(name: str, family: Family) -> Any:
    """Where the VLM's own tokenizer is."""
    entry = getattr(family.model, "ocvtp_entry", None)
    folder = family.model.config.name_or_path if entry is None else entry.folder
    if not folder:
        raise BadInput(f"{name} reads the prompt back: give tokenizer=, the VLM's tokenizer or its folder")
    return folder


def _loaded(kind: Any, place: Any, what: str, **options: Any) -> Any:
    """Something of transformers from a folder, or from what was fetched of the hub, as ID or ID@COMMIT."""
    name, _, commit = (str(place), "", "") if Path(place).exists() else str(place).partition("@")
    try:
        return kind.from_pretrained(name, revision=commit or None, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        fetch = f"hf download {name}{f' --revision {commit}' if commit else ''}"
        raise NotAvailable(f"{what} is not in {place}, nor was it fetched from the hub (`{fetch}`): {error}") from error
