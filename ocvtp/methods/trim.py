"""TRIM: the tokens that CLIP's text tower finds to go with the question, and the mean of all others.

With f a patch's token of the layer that the LLM is fed from, P_v and P_t CLIP's projections and k the budget:

1. I = P_v(post_layernorm(f)), t = P_t(text tower's end token) of the question, cut at the text tower's 77 tokens;
2. the k - 1 patches with the lowest product I t stay, of vectors as they are: the authors' paper speaks of a cosine,
   their code takes none (`similarity="cosine"`; about 4.5 of 64 tokens are others then). Lowest, as in their code and
   not as in their paper: single patches of CLIP are known to be least like the text that they show;
3. the mean of all others is one token more. It stands in the place of the last of them, and is listed by its number.

The text tower comes from `clip` (a `CLIPModel`, or its folder or hub id; the catalogue names one for the VLMs that were
built on it), for LLaVA models hold none. The prompt is read back with the VLM's tokenizer (`tokenizer`), and the
question cut out of it by the regular expression `question`: its last match, in which the group that is not empty is the
question; without a match it is all of the prompt.

Where the release differs (`behaviour="reference"`; each is one option):

- `rank="softmax"`: patches are ranked by the softmax of their negated similarity in float32, in which those that are
  far behind become equal; by default by the similarity itself;
- `mean="end"`: the mean stands behind all other tokens.

Letters: G images of a group, N tokens of an image, k kept, C tower width, P width of CLIP's common space, V width of
the values that the projector reads, Q distinct questions.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible, NotAvailable
from ocvtp.methods.base import Encoded, Entry, Kept, Method, behave, no_pruner, one_of
from ocvtp.selection.ranking import highest
from ocvtp.vlms.family import Family

_REFERENCE = {"rank": ("similarity", "softmax"), "mean": ("place", "end")}
QUESTION = r"(?s)USER:\s*(.*?)\s*(?:ASSISTANT:|$)|\[INST\]\s*(.*?)\s*\[/INST\]"
"""The question in prompts in the form of Vicuna and of Mistral."""


class Trim(Method):
    """Tokens by their likeness to the question."""

    def __init__(self, clip: Any, clip_tokenizer: Any, tokenizer: Any, layer: int, options: Mapping[str, Any]) -> None:
        """`clip` is a `CLIPModel`, `layer` the index into `hidden_states` that the LLM is fed from."""
        vision = clip.vision_model
        self._image = torch.nn.Sequential(vision.post_layernorm, clip.visual_projection)
        self._text, self._text_projection = clip.text_model, clip.text_projection
        self._length = clip.config.text_config.max_position_embeddings
        self._clip_tokenizer, self._tokenizer = clip_tokenizer, tokenizer
        self._layer, self._question = layer, re.compile(options["question"])
        self._options = options

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        return {self._layer}

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        tokens_GNC, values_GNV = encoded.tokens(self._layer), encoded.vision.values(encoded.members)
        text_GP = self.embed(self.questions(encoded.prompts), tokens_GNC.device)
        image_GNP = self._image(tokens_GNC.to(self._text_projection.weight.dtype)).float()
        if self._options["similarity"] == "cosine":
            image_GNP, text_GP = (torch.nn.functional.normalize(each, dim=-1) for each in (image_GNP, text_GP))
        scores_GN = -(image_GNP @ text_GP[..., None])[..., 0]
        if self._options["rank"] == "softmax":
            scores_GN = scores_GN.softmax(1)
        return self._with_mean(highest(scores_GN, encoded.keep - 1), values_GNV)

    def _with_mean(self, picked_Gp: Tensor, values_GNV: Tensor) -> Kept:
        """The tokens that were picked and the mean of the others."""
        count, width = values_GNV.shape[1:]
        dropped_GN = torch.ones(values_GNV.shape[:2], device=values_GNV.device).scatter_(1, picked_Gp, 0.0)
        mean_G1V = (dropped_GN[:, None] @ values_GNV.float()) / dropped_GN.sum(1)[:, None, None]
        numbers_N = torch.arange(count, device=values_GNV.device)
        last_G1 = torch.where(dropped_GN > 0, numbers_N, -1).amax(1, keepdim=True)
        picked_GpV = values_GNV.gather(1, picked_Gp[..., None].expand(-1, -1, width))
        values_GkV = torch.cat([picked_GpV, mean_G1V.to(values_GNV.dtype)], 1)
        indices_Gk, order_Gk = torch.cat([picked_Gp, last_G1], 1).sort(1)
        if self._options["mean"] == "place":
            values_GkV = values_GkV.gather(1, order_Gk[..., None].expand(-1, -1, width))
        return Kept(indices_Gk, values_GkV)

    def questions(self, prompts: Sequence[list[int]]) -> list[str]:
        """The question in each prompt."""
        texts = self._tokenizer.batch_decode(prompts, skip_special_tokens=True)
        return [self._asked(text) for text in texts]

    def _asked(self, text: str) -> str:
        matches = list(self._question.finditer(text))
        if not matches:
            return text.strip()
        return next((group for group in matches[-1].groups() if group), "").strip()

    def embed(self, questions: Sequence[str], device: torch.device) -> Tensor:
        """Each question in CLIP's common space, [G, P] float32."""
        if self._text_projection.weight.device != device:
            for module in (self._image, self._text, self._text_projection):
                module.to(device)
        distinct = list(dict.fromkeys(questions))
        inputs = self._clip_tokenizer(
            distinct, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(device)
        ended_QC = self._text(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
        text_QP = self._text_projection(ended_QC).float()
        text_GP: Tensor = text_QP[[distinct.index(question) for question in questions]]
        return text_GP


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    from transformers import AutoTokenizer, CLIPModel

    no_pruner("trim", pruner)
    options = behave("trim", options, _REFERENCE)
    for option, legal in {**_REFERENCE, "similarity": ("dot", "cosine")}.items():
        one_of("trim", options, option, legal)
    try:
        re.compile(options["question"])
    except (re.error, TypeError) as error:
        raise BadInput(
            f"trim has no question={options['question']!r}: a regular expression is needed: {error}"
        ) from error
    if not family.facts.cls:
        raise Incompatible("trim needs a CLIP tower, whose text tower reads the question: this VLM has another tower")
    clip, clip_tokenizer = options["clip"] or _text_tower(family), options["clip_tokenizer"]
    if not isinstance(clip, CLIPModel):
        clip_tokenizer = clip_tokenizer or clip
        clip = _loaded(CLIPModel, clip, "a CLIPModel", dtype=torch.float32)
    if clip_tokenizer is None:
        raise BadInput("trim needs clip_tokenizer: the tokenizer of the CLIPModel, or its folder")
    width = clip.config.vision_config.hidden_size
    if width != family.facts.width:
        raise Incompatible(
            f"the vision tower that clip was trained with has width {width}, but that of the VLM {family.facts.width}"
        )
    tokenizer = options["tokenizer"] or _own_folder(family)
    clip_tokenizer, tokenizer = (
        each if callable(each) else _loaded(AutoTokenizer, each, "a tokenizer") for each in (clip_tokenizer, tokenizer)
    )
    return Trim(clip.eval(), clip_tokenizer, tokenizer, family.facts.feature_layer, options)


def _text_tower(family: Family) -> str:
    """The CLIP that the catalogue names for this VLM."""
    entry = getattr(family.model, "ocvtp_entry", None)
    named = None if entry is None else entry.text_tower
    if named is None:
        raise NotAvailable(
            f"{'this VLM' if entry is None else entry.name} has no text tower, and trim needs that of the CLIP which "
            "its vision tower was trained with: give clip=FOLDER, a hub id, or a CLIPModel"
        )
    return str(named)


def _own_folder(family: Family) -> Any:
    """Where the VLM's own tokenizer is."""
    entry = getattr(family.model, "ocvtp_entry", None)
    folder = family.model.config.name_or_path if entry is None else entry.folder
    if not folder:
        raise BadInput("trim reads the prompt back: give tokenizer=, the VLM's tokenizer or its folder")
    return folder


def _loaded(kind: Any, place: Any, what: str, **options: Any) -> Any:
    """Something of transformers from a folder, or from what was fetched of the hub, as ID or ID@COMMIT."""
    name, _, commit = (str(place), "", "") if Path(place).exists() else str(place).partition("@")
    try:
        return kind.from_pretrained(name, revision=commit or None, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        fetch = f"hf download {name}{f' --revision {commit}' if commit else ''}"
        raise NotAvailable(f"{what} is not in {place}, nor was it fetched from the hub (`{fetch}`): {error}") from error


ENTRY = Entry(
    name="trim",
    acts="before the LLM",
    needs_text=True,
    source="TRIM, arXiv 2409.10994",
    random=False,
    trained=False,
    options={
        "behaviour": "default",
        "clip": None,
        "clip_tokenizer": None,
        "tokenizer": None,
        "question": QUESTION,
        "similarity": "dot",
        "rank": None,
        "mean": None,
    },
    build=_build,
    needs=frozenset({"clip tower", "text tower"}),
)
