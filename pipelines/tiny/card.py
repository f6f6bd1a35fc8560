"""Write the finished tiny-llava: weights in bfloat16, processor, and a model card with what was measured."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from ocvtp.data.questions import KINDS, ask
from pipelines.tiny import language, tower
from pipelines.tiny.maker import PATCHES, Curve, Maker
from pipelines.tiny.model import make_processor
from pipelines.tiny.pool import Pool

KEPT = (144, 72, 48, 32, 16, 8)


def publish(maker: Maker, curves: dict[str, Curve], out: Path) -> None:
    """Save `maker.model` and its processor to `out`, load them again as any user would, measure, write the card."""
    out.mkdir(parents=True, exist_ok=True)
    maker.model.to(torch.bfloat16).save_pretrained(out)
    make_processor().save_pretrained(out)
    (out / "curves.json").write_text(json.dumps(curves, indent=0))
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).to(maker.device)
    features = tower.all_features(model.model.vision_tower, maker.unseen, maker.device)

    def encode(indices: np.ndarray, chosen_BV: torch.Tensor) -> torch.Tensor:
        tokens_BPC = features[indices].float()
        chosen_BVC = tokens_BPC.gather(1, chosen_BV[..., None].expand(-1, -1, tokens_BPC.shape[2]))
        projected: torch.Tensor = model.model.multi_modal_projector(chosen_BVC.to(maker.device))
        return projected

    found: dict[str, float] = {}
    for kept in KEPT:
        found |= language.answer_accuracy(model, maker.asker, maker.unseen, encode, kept, maker.device)
    constant = _best_constant(maker.unseen)
    rows = [
        f"| {kind} | {100 * constant[kind]:.1f} | "
        + " | ".join(f"{100 * found[f'{kind} @{k}']:.1f}" for k in KEPT)
        + " |"
        for kind in KINDS
    ]
    last = {name: {k: v for row in curve for k, v in row.items()} for name, curve in curves.items()}
    parameters = sum(p.numel() for p in model.parameters())
    card = _CARD.format(
        parameters=f"{parameters / 1e6:.2f}",
        scenes=f"{maker.recipe.scenes:,}",
        unseen=f"{maker.recipe.validation_scenes:,}",
        batch=maker.recipe.batch,
        questions=maker.recipe.questions,
        seed=maker.recipe.seed,
        all=PATCHES,
        heads=" | ".join(f"{k}" for k in KEPT),
        lines=" | ".join("---:" for _ in KEPT),
        rows="\n".join(rows),
        steps="\n".join(_stage_line(name, maker, last[name]) for name in curves),
    )
    (out / "README.md").write_text(card)


def _stage_line(name: str, maker: Maker, last: dict[str, float]) -> str:
    schedule = getattr(maker.recipe, name)
    ends = ", ".join(f"{k} {v:.3g}" for k, v in last.items() if k != "step" and "@" not in k)
    return f"| {name} | {schedule.steps} | {schedule.learning_rate:g} | {ends} |"


def _best_constant(pool: Pool) -> dict[str, float]:
    """Accuracy of always giving the commonest answer to a kind of question."""
    shares: dict[str, float] = {}
    for kind in KINDS:
        rng = np.random.default_rng([7, 0])
        asked = [ask(scene, kind, rng) for scene in pool.scenes]
        answers = Counter(question.answer for question in asked if question is not None)
        shares[kind] = max(answers.values()) / sum(answers.values())
    return shares


_CARD = """---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---
# tiny-llava

A real, small vision language model for testing vision token pruning on a laptop: a `LlavaForConditionalGeneration`
of {parameters} M parameters with a 12-layer CLIP tower ({all} patch tokens of 96 x 96 images), LLaVA's projector and a
4-layer Llama over a vocabulary of words. It answers questions about coloured shapes and digits, and nothing else.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```

## How it was made
`python -m pipelines.tiny train` (seed {seed}) makes it from nothing, from {scenes} synthetic scenes
(`ocvtp.data.scenes`, split `vlm`), in stages, as real VLMs are made, batches of {batch}:

1. `tower`: the CLIP tower alone. Linear read-outs of layer -2 name the colour, shape, size, digit and middle of the
   object in each patch; CLS of layer -2 and of the last layer tags the whole picture, so CLS attention means something.
   A mild penalty keeps tokens near unit size, since LLaVA's projector has no norm of its own.
2. `language`: the language model alone, on scenes told in words (each patch is the sum of the embeddings of the words
   for what it shows), so that it learns to look things up, first among few patches, then among all.
3. `projector`: the projector alone, on questions about images; tower and language model frozen.
4. `vlm`: projector and language model; tower frozen.

In stages 2 to 4 {questions} questions are packed in one sequence, each seeing the scene and itself alone, and **vision
tokens are dropped at random**: in stages 3 and 4 three batches of ten keep all tokens, the others between 8 and {all}
(log-uniform). In three images of four the middle of each object is kept before other tokens, so that questions stay
answerable; in the fourth the choice is blind. So the model bears fewer tokens than it was built for, as large VLMs do.

| stage | steps | peak learning rate | where it ended |
|---|---:|---:|---|
{steps}

`curves.json` holds the loss curves.

## Accuracy on {unseen} unseen scenes, in percent
Columns: tokens kept (chosen as in training, not by any pruner). "Constant" always gives the commonest answer.

| question | constant | {heads} |
|---|---:|{lines}|
{rows}

## Limits
It knows seven colours, five shapes and the ten digits of the scenes it was trained on. Figures measured with it show
that a pipeline works and how methods compare on small objects; they do not carry over to large VLMs.
"""
