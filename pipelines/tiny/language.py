"""Stages (b), (c) and (d): questions, first about scenes told in words, then about images.

Several questions about one scene are packed into one sequence: the mask lets each see the scene and itself alone, so
that every question stands exactly as it does when it is asked by itself.

Letters: B scenes, P tokens of an image, V of them that are kept, Q questions a scene, L tokens a question, M = Q L,
N positions of a sequence (what stands before the image, V, what stands behind it, M), D width of the language model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ocvtp.data.questions import KINDS, POST_PROMPT, Question, ask
from ocvtp.data.scenes import DIGITS, Scene
from pipelines.tiny.architecture import Architecture
from pipelines.tiny.loop import Losses, autocast
from pipelines.tiny.pool import COLOR_NAMES, SHAPE_NAMES, SIZE_NAMES, Pool, Pools, draw

LONGEST = 16
"""Tokens of a question with its answer; longer ones do not occur."""
IGNORED = -100
FEWEST = 1 / 18
"""Share of its tokens that an image keeps at least: 8 of 144."""
Encode = Callable[[int, NDArray[np.int64], Tensor], Tensor]
"""`encode(number of the pool, scenes, chosen_BV)`: embeddings of the chosen tokens [B, V, D] or, with planes, more."""
_KIND_SHARES = {"existence": 0.22, "color": 0.2, "shape": 0.2, "count": 0.23, "digit": 0.15}


@dataclass(frozen=True)
class Packed:
    """Questions as token ids [B, Q, L] and the ids to be predicted (`IGNORED` where nothing is asked)."""

    ids_BQL: Tensor
    labels_BQL: Tensor


@dataclass(frozen=True)
class Shown:
    """Of images: embeddings of the tokens that are kept, with planes behind them if there are any, and their places."""

    embedded_BVX: Tensor
    chosen_BV: Tensor
    grid: tuple[int, int]


class Asker:
    """Draws and encodes questions; the encoding of a text is kept, since texts come again and again."""

    def __init__(self, architecture: Architecture, questions: int) -> None:
        self.tokenizer: PreTrainedTokenizerBase = architecture.make_processor().tokenizer
        self.lead: list[int] = self.tokenizer(architecture.lead).input_ids
        self.tail: list[int] = self.tokenizer(architecture.tail, add_special_tokens=False).input_ids
        self.questions = questions
        self._known: dict[str, list[int]] = {}

    def draw(self, scene: Scene, rng: np.random.Generator) -> Question:
        """A question of a random kind that the scene allows."""
        while True:
            kind = KINDS[int(rng.choice(len(KINDS), p=[_KIND_SHARES[k] for k in KINDS]))]
            question = ask(scene, kind, rng)
            if question is not None:
                return question

    def encode(self, text: str) -> list[int]:
        """Token ids without a start token."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def pack(self, scenes: list[Scene], rng: np.random.Generator) -> Packed:
        """Questions about each scene, three in four with the benchmarks' instruction."""
        shape = (len(scenes), self.questions, LONGEST)
        ids_BQL = torch.full(shape, int(self.tokenizer.pad_token_id))
        labels_BQL = torch.full(shape, IGNORED)
        for b, scene in enumerate(scenes):
            for q in range(self.questions):
                question = self.draw(scene, rng)
                instruction = f"\n{POST_PROMPT}" if rng.random() < 0.75 else ""
                asked = self.encode(f"{question.text}{instruction} ASSISTANT:")
                answer = self.encode(f"{question.answer}</s>")
                length = len(asked) + len(answer)
                ids_BQL[b, q, :length] = torch.tensor(asked + answer)
                labels_BQL[b, q, len(asked) : length] = torch.tensor(answer)
        return Packed(ids_BQL, labels_BQL)


def choose_tokens(pool: Pool, indices: NDArray[np.int64], kept: int, rng: np.random.Generator) -> Tensor:
    """Which tokens stay, [B, V] ascending.

    In three images of four a token in the middle of each object is kept before others, and tokens on objects are a
    little likelier than background, so that most questions stay answerable; in the fourth the choice is blind.
    """
    chance_BP = torch.from_numpy(rng.random((len(indices), pool.center_SP.shape[1])).astype(np.float32))
    shown_BP = ((pool.shape_SP[indices] + pool.digit_SP[indices]) > 0).float()
    favoured_B1 = torch.from_numpy((rng.random((len(indices), 1)) < 0.75).astype(np.float32))
    score_BP = chance_BP + favoured_B1 * (pool.center_SP[indices] + 0.25 * shown_BP)
    return score_BP.topk(kept, 1).indices.sort(1).values


def draw_kept(tokens: int, rng: np.random.Generator, *, most: float, all_share: float) -> int:
    """How many tokens the images of a batch keep: all with probability `all_share`, else few to many.

    Log-uniform between `FEWEST` and `most`, both shares.
    """
    if rng.random() < all_share:
        return tokens
    least = max(1, round(FEWEST * tokens))
    return round(float(np.exp(rng.uniform(np.log(least), np.log(max(least, round(most * tokens)))))))


def answer_losses(
    architecture: Architecture, model: Any, shown: Shown, packed: Packed, asker: Asker
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers, and logits [B, Q, L, vocabulary] at all question positions."""
    embed = model.get_input_embeddings()
    batch, kept = shown.chosen_BV.shape
    questions, length = packed.ids_BQL.shape[1:]
    device = shown.embedded_BVX.device
    said = [embed(torch.tensor(ids, dtype=torch.long, device=device)).expand(batch, -1, -1)
            for ids in (asker.lead, asker.tail)]  # fmt: skip
    asked_BMD = embed(packed.ids_BQL.to(device)).flatten(1, 2)
    embedded_BVD, *planes = shown.embedded_BVX.to(asked_BMD.dtype).split(embed.embedding_dim, 2)
    before, behind = len(asker.lead), len(asker.tail)
    mask_NN = _block_mask(before + kept + behind, questions, length)
    place_M = torch.arange(length).repeat(questions)  # positions start anew with every question
    places = torch.cat([torch.arange(behind), behind + place_M])
    hidden_BND = architecture.decode(
        model,
        torch.cat([said[0], embedded_BVD, said[1], asked_BMD], 1),
        mask_NN.to(device),
        architecture.positions(shown.chosen_BV, shown.grid, before, places).to(device),
        before,
        planes,
    )
    hidden_BMD = hidden_BND[:, before + kept + behind :]
    logits_BQLK = model.lm_head(hidden_BMD).float().unflatten(1, (questions, length))
    loss = F.cross_entropy(
        logits_BQLK[:, :, :-1].flatten(0, 2),
        packed.labels_BQL[:, :, 1:].to(device).flatten(),
        ignore_index=IGNORED,
    )
    return loss, logits_BQLK


def _block_mask(prefix: int, questions: int, length: int) -> Tensor:
    """Who sees whom, bool [N, N]."""
    block_N = torch.cat([torch.full((prefix,), -1), torch.arange(questions).repeat_interleave(length)])
    same_NN = (block_N[:, None] == block_N[None]) | (block_N[None] == -1)
    causal_NN = torch.ones(len(block_N), len(block_N), dtype=torch.bool).tril()
    return same_NN & causal_NN


class TextScenes(nn.Module):
    """Scenes told in words: each token is the sum of the embeddings of the words that describe it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        ids = tokenizer.convert_tokens_to_ids
        self.tables: Mapping[str, Tensor] = {
            "color": torch.tensor([ids("nothing"), *map(ids, COLOR_NAMES)]),
            "shape": torch.tensor([ids("nothing"), *map(ids, SHAPE_NAMES)]),
            "size": torch.tensor([ids("nothing"), *map(ids, SIZE_NAMES)]),
            "digit": torch.tensor([ids("nothing"), *map(ids, DIGITS)]),
            "center": torch.tensor([ids("nothing"), ids("center")]),
        }

    def forward(self, embed: nn.Module, pool: Pool, indices: NDArray[np.int64], chosen_BV: Tensor) -> Tensor:
        """Embeddings [B, V, D] of the chosen tokens."""
        total: Tensor | None = None
        for name, table in self.tables.items():
            label_BV = getattr(pool, f"{name}_SP")[indices].gather(1, chosen_BV)
            words_BVD = embed(table[label_BV].to(next(embed.parameters()).device))
            said_BVD = words_BVD * (label_BV > 0)[..., None].to(words_BVD)
            total = said_BVD if total is None else total + said_BVD
        assert total is not None  # noqa: S101 - the table is never empty
        nothing_BV = (pool.shape_SP[indices] + pool.digit_SP[indices]).gather(1, chosen_BV) == 0
        nothing_1D: Tensor = embed(self.tables["color"][:1].to(total.device))
        return total + nothing_1D * nothing_BV[..., None].to(total)


def step_losses(
    architecture: Architecture,
    model: Any,
    asker: Asker,
    pools: Pools,
    encode: Encode,
    kept_at: Callable[[int, int, np.random.Generator], int],
    *,
    batch: int,
    seed: tuple[int, ...],
) -> Callable[[int], Losses]:
    """The loss of a step; `kept_at(step, tokens, rng)` says how many tokens of an image are kept."""

    def losses(step: int) -> Losses:
        rng = np.random.default_rng([*seed, step])
        number, indices = draw(pools, batch, rng)
        pool = pools[number]
        chosen_BV = choose_tokens(pool, indices, kept_at(step, pool.center_SP.shape[1], rng), rng)
        packed = asker.pack([pool.scenes[i] for i in indices], rng)
        shown = Shown(encode(number, indices, chosen_BV), chosen_BV, pool.grid)
        return {"answers": answer_losses(architecture, model, shown, packed, asker)[0]}

    return losses


@torch.inference_mode()
def answer_accuracy(
    architecture: Architecture, model: Any, asker: Asker, pools: Pools, encode: Encode, share: float, device: str
) -> Mapping[str, float]:
    """Share of unseen questions of each kind whose first answer token is right, with a share of an image's tokens."""
    hits: dict[str, list[bool]] = {}
    for number, pool in enumerate(pools):
        kept = max(1, round(share * pool.center_SP.shape[1]))
        for start in range(0, len(pool), 100):
            rng = np.random.default_rng([7, start])
            indices = np.arange(start, min(start + 100, len(pool)))
            chosen_BV = choose_tokens(pool, indices, kept, rng)
            for kind in KINDS:
                asked = [(i, b, ask(pool.scenes[i], kind, rng)) for b, i in enumerate(indices)]
                rows = [(b, q) for _, b, q in asked if q is not None]
                if not rows:
                    continue
                packed = _pack_each(asker, [q for _, q in rows])
                some = [b for b, _ in rows]
                with autocast(device):
                    shown = Shown(encode(number, indices[some], chosen_BV[some]), chosen_BV[some], pool.grid)
                    _, logits_BQLK = answer_losses(architecture, model, shown, packed, asker)
                wanted_B1L = packed.labels_BQL
                first_B = (wanted_B1L[:, 0] != IGNORED).float().argmax(1)
                found_B = logits_BQLK[torch.arange(len(some)), 0, first_B - 1].argmax(-1).cpu()
                hits.setdefault(kind, []).extend((found_B == wanted_B1L[torch.arange(len(some)), 0, first_B]).tolist())
    return {f"{kind} @{share:.1%}": float(np.mean(found)) for kind, found in hits.items()}


def _pack_each(asker: Asker, questions: list[Question]) -> Packed:
    ids_B1L = torch.full((len(questions), 1, LONGEST), int(asker.tokenizer.pad_token_id))
    labels_B1L = torch.full((len(questions), 1, LONGEST), IGNORED)
    for b, question in enumerate(questions):
        asked = asker.encode(f"{question.text}\n{POST_PROMPT} ASSISTANT:")
        answer = asker.encode(question.answer)
        ids_B1L[b, 0, : len(asked)] = torch.tensor(asked)
        labels_B1L[b, 0, len(asked)] = answer[0]
    return Packed(ids_B1L, labels_B1L)
