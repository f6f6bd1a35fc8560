"""The VLM that teaches: what it answers with all tokens of an image, and with some, on prompts of any length.

The tower and the answers with all tokens are computed once an image and a prompt, each alone, so that they depend on
nothing else, and are held while they fit a budget of memory. Only the pass over kept tokens has gradients: through the
language model's weights, which stay as they are, to the embeddings of the kept tokens and so to their weights.

It reads all that the tower sees, as pruners do (`Family.untrimmed`): of LLaVA-NeXT that is `flat`, in whatever mode the
model is.

Letters: B images, R prompts of them, N tokens of an image, S kept ones, D width of the language model, L columns of
the prompts, A places of an answer, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ocvtp.answers.asking import Prompt, Prompts, check_all, digest, prompts_of
from ocvtp.data.scenes import SceneSet
from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods import Budget
from ocvtp.pruner.seeding import generator
from ocvtp.pruner.training.train_config import TrainConfig
from ocvtp.pruning.forward import EncodedCall, Forward
from ocvtp.pruning.splice import Spot
from ocvtp.tokens.extract import ImageRecord, open_record
from ocvtp.vlms.loading import VLM

MEMORY_BUDGET: Final = 2 * 2**30
"""Bytes of what is held of images and answers by default."""


@dataclass(frozen=True)
class _Seen:
    """An image: what the language model reads of each token, where among the placeholders it goes, and of how many."""

    features_ND: Tensor
    places_N: Tensor
    whole: int

    @property
    def bytes(self) -> int:
        return self.features_ND.nbytes


@dataclass(frozen=True)
class _Asked:
    """A prompt with the answer that is compared: its ids, where the image stands, and what positions depend on."""

    ids_L: Tensor
    start: int
    length: int
    places: int
    extras: Mapping[str, Tensor]


class Teacher:
    """A frozen VLM with its images and prompts; see `ocvtp.pruner.training.answers.Teacher`."""

    def __init__(
        self,
        vlm: VLM,
        picture: Callable[[str], Image.Image],
        prompts: Prompts,
        *,
        preprocessing: str = "pad",
        prompts_a_step: int = 2,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        """Freeze the VLM: its weights take no gradients from now on.

        Args:
            vlm: not pruned.
            picture: an image by its id.
            prompts: of an image, by its id.
            preprocessing: how an image becomes pixels: as for the tokens on disk.
            prompts_a_step: how many of an image's prompts a step puts to it.
            memory_budget: bytes up to which features and answers are held; what is beyond is computed each time.

        Raises:
            BadInput: a model that is pruned.
        """
        if "_ocvtp_handle" in vlm.model.__dict__:
            raise BadInput("the VLM that teaches is pruned: call remove() on its handle first")
        self._vlm, self._family, self._model = vlm, vlm.family.untrimmed(), vlm.model.eval().requires_grad_(False)
        self._forward = Forward(
            self._model, self._family, self._model.forward, None, Budget.parse(1.0), None, "compact"
        )
        self._picture, self._prompts = picture, prompts
        self._preprocessing, self._a_step, self._room = preprocessing, prompts_a_step, memory_budget
        self._images: list[str] = []
        self._seen: dict[str, _Seen] = {}
        self._answers: dict[tuple[str, int], Tensor] = {}
        self._asked: dict[tuple[str, int], _Asked] = {}

    @property
    def width(self) -> int:
        """Numbers a token in the tower."""
        return self._vlm.width

    @property
    def weights(self) -> str:
        """Fingerprint of the VLM's weights."""
        return self._vlm.weights

    @property
    def identity(self) -> dict[str, Any]:
        """The VLM, its type, how images become pixels, and the prompts of all images that were checked."""
        return {
            "model": self._vlm.entry.identity,
            "dtype": str(self._model.dtype),
            "preprocessing": self._preprocessing,
            "prompts": digest(self._prompts, self._images),
            "prompts_a_step": self._a_step,
        }

    def check(self, images: Sequence[str]) -> None:
        """`BadInput` names images of which nothing is asked."""
        check_all(self._prompts, images)
        self._images = list(images)

    def divergence(self, images: Sequence[str], kept_BS: Tensor, weights_BSN: Tensor, draw: int | None) -> Tensor:
        """KL of the answers with the kept tokens from those with all, [B].

        Raises:
            Incompatible: the VLM has another number of tokens for an image than `weights_BSN`.
        """
        rows = [(b, number) for b, image in enumerate(images) for number in self._drawn(image, draw)]
        with torch.autocast(self._model.device.type, enabled=False):
            kept = [self._kept(image, kept_S, weights_SN)
                    for image, kept_S, weights_SN in zip(images, kept_BS.cpu(), weights_BSN, strict=True)]  # fmt: skip
            asked = [self._ask(images[b], number) for b, number in rows]
            found = self._answer(asked, [kept[b] for b, _ in rows])
            errors_R = torch.stack([
                F.kl_div(said_AV, self._taught(images[b], number).to(said_AV.device), reduction="none", log_target=True)
                .sum(1).mean()
                for (b, number), said_AV in zip(rows, found, strict=True)
            ])  # fmt: skip
        of_R = torch.tensor([b for b, _ in rows], device=errors_R.device)
        counts_B = torch.bincount(of_R, minlength=len(images))
        return torch.zeros(len(images), device=errors_R.device).index_add(0, of_R, errors_R) / counts_B

    # --- Images and prompts ------------------------------------------------------------------------------------------

    def _drawn(self, image: str, draw: int | None) -> list[int]:
        """Numbers of the prompts of a step."""
        count = len(self._prompts(image))
        if draw is None or count <= self._a_step:
            return list(range(count))
        order = torch.randperm(count, generator=generator("ocvtp prompts", draw, image))
        return sorted(order[: self._a_step].tolist())

    def _hold(self, store: dict[Any, Any], key: Any, value: Any, size: int) -> Any:
        """Keep something if there is room."""
        if size <= self._room:
            self._room -= size
            store[key] = value
        return value

    @torch.no_grad()
    def _encoded(self, image: str) -> _Seen:
        """An image through the tower and the projector, alone."""
        if image in self._seen:
            return self._seen[image]
        images = self._family.preprocess(self._vlm.processor, [self._picture(image)], mode=self._preprocessing)
        values_NV = self._family.encode(images, ()).values([0])[0]
        (features_ND,) = self._family.project([values_NV])
        placed = self._family.place(images, 0, torch.arange(len(features_ND)), features_ND)
        seen = _Seen(placed.features_XD, placed.places_X, placed.whole)
        held: _Seen = self._hold(self._seen, image, seen, seen.bytes)
        return held

    def _kept(self, image: str, kept_S: Tensor, weights_SN: Tensor) -> tuple[Tensor, _Seen, Tensor]:
        """Features [S, D] of the kept tokens of an image, the image, and their numbers."""
        seen = self._encoded(image)
        count, given = len(seen.features_ND), weights_SN.shape[1]
        there = int((kept_S >= 0).sum())
        if count > given or bool(weights_SN[:, count:].detach().any()):
            raise Incompatible(f"image {image} has {count} tokens here, but tokens on disk are {given}: extract them "
                               "again with the same preprocessing")  # fmt: skip
        features_SD = weights_SN[:there, :count] @ seen.features_ND.to(weights_SN.device, weights_SN.dtype)
        return features_SD, seen, kept_S[:there]

    @torch.no_grad()
    def _taught(self, image: str, number: int) -> Tensor:
        """Logarithms of the answer's distributions with all tokens, [A, V]; each prompt alone."""
        key = (image, number)
        if key in self._answers:
            return self._answers[key]
        seen = self._encoded(image)
        everything = (seen.features_ND, seen, torch.arange(len(seen.features_ND)))
        (answer_AV,) = self._answer([self._ask(image, number)], [everything])
        held: Tensor = self._hold(self._answers, key, answer_AV, answer_AV.nbytes)
        return held

    def _ask(self, image: str, number: int) -> _Asked:
        """A prompt of an image as ids."""
        key = (image, number)
        if key not in self._asked:
            self._asked[key] = self._tokenized(self._picture(image), self._prompts(image)[number])
        return self._asked[key]

    def _tokenized(self, picture: Image.Image, prompt: Prompt) -> _Asked:
        processor, family = self._vlm.processor, self._family
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.text}]}]
        text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        made = processor(text=[text], images=[family.prepare(processor, picture)], return_tensors="pt")
        images = family.images(made)
        assert images is not None  # noqa: S101 - there is one
        ((_, start, length),) = family.find(made["input_ids"], images)
        answer = processor.tokenizer(prompt.answer, add_special_tokens=False)["input_ids"] if prompt.answer else []
        # The last token of an answer is compared, and nothing after it.
        ids_L = torch.cat([made["input_ids"][0], torch.tensor(answer[:-1], dtype=torch.long)])
        extras = {name: made[name] for name in (*family.position_inputs, *family.column_inputs) if name in made}
        return _Asked(ids_L, start, length, max(1, len(answer)), extras)

    # --- The language model ------------------------------------------------------------------------------------------

    def _answer(self, asked: Sequence[_Asked], kept: Sequence[tuple[Tensor, _Seen, Tensor]]) -> list[Tensor]:
        """Logarithms of the distributions at the places of each prompt's answer, [A, V] float32.

        Args:
            asked: the prompts.
            kept: features, image and numbers of what each prompt's image keeps.
        """
        length, most = max(len(one.ids_L) for one in asked), max(one.places for one in asked)
        device = self._model.device
        gaps = [length - len(one.ids_L) for one in asked]  # on the left
        ids_RL = torch.stack([F.pad(one.ids_L, (gap, 0), value=self._family.padding)
                              for one, gap in zip(asked, gaps, strict=True)])  # fmt: skip
        mask_RL = torch.stack([F.pad(torch.ones_like(one.ids_L), (gap, 0))
                               for one, gap in zip(asked, gaps, strict=True)])  # fmt: skip
        spots = [
            Spot(features_SD, seen.places_N[kept_S], kept_S, seen.whole, row, gap + one.start, one.length)
            for row, (one, gap, (features_SD, seen, kept_S)) in enumerate(zip(asked, gaps, kept, strict=True))
        ]
        call = {
            "input_ids": ids_RL.to(device),
            "attention_mask": mask_RL.to(device),
            "use_cache": False,
            "logits_to_keep": most,
            **{name: self._stacked(name, asked, length).to(device) for name in asked[0].extras},
        }
        output, _ = self._forward.shortened(call, EncodedCall(spots, len(asked), length), len(asked))
        said_RAV = output.logits[:, -most:].float().log_softmax(2)
        return [said_AV[most - one.places :] for one, said_AV in zip(asked, said_RAV, strict=True)]

    def _stacked(self, name: str, asked: Sequence[_Asked], length: int) -> Tensor:
        """What positions depend on: of all columns, zero where prompts are longer, or of each image."""
        parts = [one.extras[name] for one in asked]
        if name in self._family.column_inputs:
            behind = [len(one.ids_L) - part.shape[1] for one, part in zip(asked, parts, strict=True)]
            fill = self._family.column_inputs[name]
            parts = [
                F.pad(part, (length - part.shape[1] - end, end), value=fill)
                for part, end in zip(parts, behind, strict=True)
            ]
        return torch.cat(parts)


def teacher_of(
    vlm: VLM,
    config: TrainConfig,
    records: Sequence[ImageRecord],
    *,
    scenes: SceneSet | None = None,
    preprocessing: str = "pad",
    prompts_file: Path | None = None,
) -> Teacher:
    """The teacher that a training asks for.

    Args:
        vlm: whose tower made the tokens.
        config: of the training: `prompts` and what belongs to them.
        records: the training images.
        scenes: which synthetic scenes these images are; None if they are something else.
        preprocessing: as for the tokens.
        prompts_file: where the file that `config.prompts` names is, if elsewhere.

    Raises:
        BadInput: no questions come with the images; a file of prompts that cannot be read.
    """
    prompts = prompts_of(config, scenes, prompts_file)
    found = {record.id: record for record in records}
    # Of an image that is not among them nothing is asked, and so it is refused.
    return Teacher(vlm, lambda name: open_record(found[name]), lambda name: prompts(name) if name in found else (),
                   preprocessing=preprocessing, prompts_a_step=config.prompts_a_step)  # fmt: skip
