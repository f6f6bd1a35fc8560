"""What is asked of training images: questions about synthetic scenes, lines of a file, or the same of each image."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ocvtp.data.questions import KINDS, POST_PROMPT, ask
from ocvtp.data.scenes import SceneSet
from ocvtp.data.training_splits import TRAINING_SPLITS, training_scene
from ocvtp.errors import BadInput
from ocvtp.pruner.training.train_config import QUESTIONS, TrainConfig

_DRAWS = 3
"""Of the generator of these questions: those of benchmarks are drawn from another, about scenes of another split."""


@dataclass(frozen=True)
class Prompt:
    """A question to a VLM.

    Attributes:
        text: without the image and without the model's template.
        answer: where there is one, the places of all its tokens are compared; else that of the first token alone.
    """

    text: str
    answer: str = ""


Prompts = Callable[[str], Sequence[Prompt]]
"""Of an image, by its id; none where nothing is asked of it."""


def generic(texts: Sequence[str]) -> Prompts:
    """The same of each image.

    Raises:
        BadInput: no texts, or empty ones.
    """
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadInput(f"prompts are {list(texts)!r}: a list of texts such as 'Describe the image.' is needed")
    asked = tuple(Prompt(text) for text in texts)
    return lambda _: asked


def scene_questions(scenes: SceneSet, number: int) -> Prompts:
    """Questions about scenes that pruners are trained on, with their right answers: `number` of each scene.

    Args:
        scenes: of which the images are training splits.
        number: of each scene; kinds of questions are drawn evenly, as far as the scene allows them.
    """

    @cache
    def of(image: str) -> tuple[Prompt, ...]:
        found_scene = training_scene(scenes, image)
        if found_scene is None:
            return ()
        split, scene = found_scene
        own = () if split == "train" else (TRAINING_SPLITS.index(split),)
        draws = np.random.default_rng([scenes.seed, _DRAWS, scene.index, *own])
        found: list[Prompt] = []
        while len(found) < number:
            question = ask(scene, KINDS[int(draws.integers(len(KINDS)))], draws)
            if question is not None:
                found.append(Prompt(f"{question.text}\n{POST_PROMPT}", question.answer))
        return tuple(found)

    return of


def read_prompts(path: Path) -> Prompts:
    """Lines of JSON, `{"image": ID, "prompt": TEXT, "answer": TEXT}`, the answer optional.

    Raises:
        BadInput: there is no such file, or a line is something else; names the line.
    """
    found: dict[str, list[Prompt]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts in {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            image, text, answer = record["image"], record["prompt"], record.get("answer", "")
            if not all(isinstance(value, str) for value in (image, text, answer)) or not text.strip():
                raise ValueError("image, prompt and answer must be texts, the prompt not empty")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}, line {number}: {error}; {{'image': ID, 'prompt': TEXT}} is needed") from error
        found.setdefault(image, []).append(Prompt(text, answer))
    return lambda image: found.get(image, ())


def prompts_of(config: TrainConfig, scenes: SceneSet | None, file: Path | None = None) -> Prompts:
    """Those that the config of a training asks for.

    Args:
        config: its `prompts` and `prompts_an_image`.
        scenes: which synthetic scenes the images are; None if they are something else.
        file: where the file is that `prompts` names, if elsewhere.

    Raises:
        BadInput: no questions come with the images; a file that cannot be read.
    """
    given = config.prompts
    if isinstance(given, tuple):
        return generic(given)
    if given != QUESTIONS:
        return read_prompts(Path(given) if file is None else file)
    if scenes is None:
        raise BadInput("prompts is questions, but none come with these images, which are no synthetic scenes: give a "
                       "list of texts, such as ['Describe the image.'], or a file of JSON lines")  # fmt: skip
    return scene_questions(scenes, config.prompts_an_image)


def check_all(prompts: Prompts, images: Sequence[str]) -> None:
    """`BadInput` names images of which nothing is asked."""
    without = [image for image in images if not prompts(image)]
    if without:
        raise BadInput(f"there are no prompts or pictures for {len(without)} of {len(images)} training images: "
                       f"{', '.join(without[:5])}{', ...' * (len(without) > 5)}")  # fmt: skip


def digest(prompts: Prompts, images: Sequence[str]) -> str:
    """SHA-256 of what is asked of these images."""
    made = hashlib.sha256()
    for image in images:
        made.update(json.dumps([image, [[p.text, p.answer] for p in prompts(image)]]).encode())
    return made.hexdigest()
