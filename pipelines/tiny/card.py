"""Write the finished tiny VLM: weights in bfloat16, processor, and a model card with what was measured."""

import json
from collections import Counter
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from ocvtp.data.questions import KINDS, ask
from pipelines.tiny import language, tower
from pipelines.tiny.maker import Curve, Maker, encoder
from pipelines.tiny.pool import Pools

KEPT = (1, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18)
"""Shares of tokens kept for which the card states the accuracy."""


def publish(maker: Maker, curves: dict[str, Curve], out: Path) -> None:
    """Save `maker.model` and its processor to `out`, load them again as any user would, measure, write the card."""
    architecture, recipe = maker.architecture, maker.recipe
    out.mkdir(parents=True, exist_ok=True)
    maker.model.to(torch.bfloat16).save_pretrained(out)
    architecture.make_processor().save_pretrained(out)
    (out / "curves.json").write_text(json.dumps(curves, indent=0))
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).to(maker.device)
    encode = encoder(
        architecture, model, tower.all_features(architecture, model, maker.unseen, maker.device), maker.device
    )
    found: dict[str, float] = {}
    for share in KEPT:
        found |= language.answer_accuracy(architecture, model, maker.asker, maker.unseen, encode, share, maker.device)
    constant = _best_constant(maker.unseen)
    rows = [
        f"| {kind} | {100 * constant[kind]:.1f} | "
        + " | ".join(f"{100 * found[f'{kind} @{share:.1%}']:.1f}" for share in KEPT)
        + " |"
        for kind in KINDS
    ]
    last = {name: {k: v for row in curve for k, v in row.items()} for name, curve in curves.items()}
    parameters = sum(p.numel() for p in model.parameters())
    first, last_side = architecture.style.sides
    sizes = f"{first} x {first} pixels" if first == last_side else f"{first} to {last_side} pixels a side"
    card = _CARD.format(
        name=architecture.name,
        about=fill(_ABOUT.format(about=architecture.about.format(parameters=f"{parameters / 1e6:.2f}")), _WIDTH),
        start=fill(
            f"`python -m pipelines.tiny train --model {architecture.name}` (seed {recipe.seed}) makes it. "
            f"{architecture.start} It learns from {recipe.scenes:,} synthetic scenes (`ocvtp.data.scenes`, split "
            f"`vlm`, {sizes}), in stages, as real VLMs are made, batches of {recipe.batch}:",
            _WIDTH,
        ),
        feature=fill(f"1. `tower`: the tower alone. {architecture.feature}", _WIDTH, subsequent_indent="   "),
        unseen=f"{recipe.validation_scenes:,}",
        questions=recipe.questions,
        limits=architecture.limits and f"{architecture.limits}\n",
        fewest=f"{language.FEWEST:.1%}",
        heads=" | ".join(f"{share:.1%}" for share in KEPT),
        lines=" | ".join("---:" for _ in KEPT),
        rows="\n".join(rows),
        steps="\n".join(_stage_line(name, maker, last[name]) for name in curves),
    )
    (out / "README.md").write_text(card)


def _stage_line(name: str, maker: Maker, last: dict[str, float]) -> str:
    schedule = getattr(maker.recipe, name)
    ends = ", ".join(f"{k} {v:.3g}" for k, v in last.items() if k != "step" and "@" not in k)
    return f"| {name} | {schedule.steps} | {schedule.learning_rate:g} | {ends} |"


def _best_constant(pools: Pools) -> dict[str, float]:
    """Accuracy of always giving the commonest answer to a kind of question."""
    shares: dict[str, float] = {}
    for kind in KINDS:
        rng = np.random.default_rng([7, 0])
        asked = [ask(scene, kind, rng) for pool in pools for scene in pool.scenes]
        answers = Counter(question.answer for question in asked if question is not None)
        shares[kind] = max(answers.values()) / sum(answers.values())
    return shares


_WIDTH = 119
_ABOUT = (
    "A real, small vision language model for testing vision token pruning on a laptop: {about}. It answers questions "
    "about coloured shapes and digits, and nothing else."
)
_CARD = """---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

{about}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```

## How it was made
{start}

{feature}
2. `language`: the language model alone, on scenes told in words (each token is the sum of the embeddings of the words
   for what it shows), so that it learns to look things up, first among few tokens, then among all.
3. `projector`: the projector alone, on questions about images; tower and language model frozen.
4. `vlm`: projector and language model; tower frozen.

In stages 2 to 4, {questions} questions are packed in one sequence, each seeing the scene and itself alone, and **vision
tokens are dropped at random**: in stages 3 and 4 three batches of ten keep all tokens, the others between {fewest} and
all (log-uniform). In three images of four the middle of each object is kept before other tokens, so that questions stay
answerable; in the fourth the choice is blind. So the model bears fewer tokens than it was built for, as large VLMs do.

| stage | steps | peak learning rate | where it ended |
|---|---:|---:|---|
{steps}

`curves.json` holds the loss curves.

## Accuracy on {unseen} unseen scenes, in percent
Columns: share of the tokens kept (chosen as in training, not by any pruner). "Constant" always gives the commonest
answer.

| question | constant | {heads} |
|---|---:|{lines}|
{rows}

## Limits
It knows seven colours, five shapes and the ten digits of the scenes it was trained on. Figures measured with it show
that a pipeline works and how methods compare on small objects; they do not carry over to large VLMs.
{limits}"""
