"""A language model run one token and one layer at a time in plain loops, dropping tokens as the spec sheets say.

Nothing of transformers' forward and of ocvtp is used: only weights, and what an unpruned model is given to read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """A token between two layers, `at` a column of the whole prompt; -1 for answers.

    `image` is None for text; `number` is None for what is merged and for newlines.
    """

    at: int
    state: Tensor
    position: tuple[int, ...]
    image: int | None = None
    number: int | None = None


@dataclass(frozen=True)
class Found:
    kept: list[list[int]]
    layers: list[list[int]]
    lengths: list[int]
    logits: Tensor


@torch.no_grad()
def read_by(model: Any, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the unpruned model hands its first layer for one prompt: embeddings and positions; and its ids."""
    seen: dict[str, Any] = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, call: seen.update(call), with_kwargs=True)
    model(**inputs)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    positions = seen.get("position_ids")
    if positions is None:
        positions = torch.arange(length)
    return seen["inputs_embeds"][0], positions.reshape(-1, length)[-3:], inputs["input_ids"][0]


class Slow:
    """One prompt and an answer through the layers."""

    def __init__(self, model: Any, inputs: Any, answer: Sequence[int], numbers: Sequence[Sequence[int | None]]) -> None:
        """`numbers`: of each image's placeholders, in their order; None for the end of a row."""
        self.model, self.decoder, self.config = model, model.get_decoder(), model.get_decoder().config
        embeds, positions, ids = read_by(model, inputs)
        labels = [(image, number) for image, each in enumerate(numbers) for number in each]
        self.columns = []
        for at, token in enumerate(ids.tolist()):
            image, number = labels.pop(0) if token == model.config.image_token_id else (None, None)
            self.columns.append(Column(at, embeds[at], tuple(positions[:, at].tolist()), image, number))
        assert not labels
        self.text_rows = len(self.columns)
        self.next = max(max(column.position) for column in self.columns) + 1
        words = model.get_input_embeddings().weight
        self.answer = [words[token] for token in answer]
        self.images = len(numbers)

    # --- The model ---------------------------------------------------------------------------------------------------

    def norm(self, states: Tensor, weight: Tensor) -> Tensor:
        return states / (states.pow(2).mean(1, keepdim=True) + self.config.rms_norm_eps).sqrt() * weight

    def rotated(self, heads: Tensor, positions: Sequence[tuple[int, ...]]) -> Tensor:
        """[H, T, E], pair (e, e + E/2) turned by position times theta^(-2e/E); M-RoPE: by the row of its section."""
        half = heads.shape[2] // 2
        sections = self.config.rope_parameters.get("mrope_section") or [half]
        rows = [row for row, width in enumerate(sections) for _ in range(width)]
        turned = heads.clone()
        for t, position in enumerate(positions):
            for e in range(half):
                angle = position[rows[e] % len(position)] * self.config.rope_parameters["rope_theta"] ** (-e / half)
                a, b = heads[:, t, e], heads[:, t, e + half]
                turned[:, t, e] = a * math.cos(angle) - b * math.sin(angle)
                turned[:, t, e + half] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    def weights(self, layer: Any, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
        """Causal attention [H, T, T] and values [H, T, E] of a layer."""
        attention, count = layer.self_attn, len(columns)
        states = self.norm(torch.stack([c.state for c in columns]), layer.input_layernorm.weight)
        heads = self.config.num_attention_heads

        def projected(linear: Any, number: int) -> Tensor:
            made = states @ linear.weight.T + (0 if linear.bias is None else linear.bias)
            return made.view(count, number, -1).transpose(0, 1).repeat_interleave(heads // number, 0)

        positions = [c.position for c in columns]
        q = self.rotated(projected(attention.q_proj, heads), positions)
        k = self.rotated(projected(attention.k_proj, self.config.num_key_value_heads), positions)
        v = projected(attention.v_proj, self.config.num_key_value_heads)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        for row in range(count):
            scores[:, row, row + 1 :] = -math.inf
        return scores.softmax(2), v

    def through(self, layer: Any, columns: list[Column]) -> list[Column]:
        weights, values = self.weights(layer, columns)
        mixed = (weights @ values).transpose(0, 1).flatten(1)
        states = torch.stack([c.state for c in columns]) + mixed @ layer.self_attn.o_proj.weight.T
        normed = self.norm(states, layer.post_attention_layernorm.weight)
        gate = normed @ layer.mlp.gate_proj.weight.T
        inner = gate * torch.sigmoid(gate) * (normed @ layer.mlp.up_proj.weight.T)
        states = states + inner @ layer.mlp.down_proj.weight.T
        return [replace(c, state=state) for c, state in zip(columns, states, strict=True)]

    # --- A run -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, method: str, stages: dict[int, Sequence[tuple[int, int]]], positions: str, **more: Any) -> Found:
        """Drop tokens before the layers in `stages`, which gives kept and merged tokens of each image.

        The answer follows with the positions that it has in each layer. `grain`: scores are rounded to so many parts.
        """
        grain = more.get("grain")
        columns, layers, lengths = self.columns, [], []
        states = list(self.answer)
        rows = {} if method in ("fastv", "pyramiddrop") else raters_of(columns, self.images, method)
        scores: dict[int, list[float]] = {}
        pivots: dict[int, list[float]] = {}
        for index, layer in enumerate(self.decoder.layers):
            if index in stages:
                if method == "pyramiddrop":
                    scores = self.scores(layer, columns, rows, grain)
                if method == "dart":
                    scores = self.least_alike(columns, rows, scores, pivots, stages[index])
                columns = dropped(columns, scores, stages[index], positions, noise=more.get("noise", False))
            if index + 1 in stages and method == "dart":
                scores, pivots = self.key_lengths(layer, columns, rows)
            elif index + 1 in stages and method == "sparsevlm-plus":
                scores = self.few_heads(layer, columns, rows, more["least"])
            elif index + 1 in stages and method != "pyramiddrop":
                scores = self.scores(layer, columns, rows, grain)
            if method == "autoprune" and index < 2:
                bits = self.bits(layer, columns, rows)
                if index == 0:
                    words = {image: max(1, len(asks)) for image, asks in rows.items()}
                    for image, each in scores.items():
                        numbers = [c.number for c in columns if c.image == image]
                        tower = [0.0 if n is None else more["tower"][image][n] for n in numbers]
                        weight = 0.3 * bits[image] / words[image]
                        scores[image] = [weight * text + a for text, a in zip(each, tower, strict=True)]
                else:
                    stages = more["adapt"](bits)
            layers.append([sum(c.image == image for c in columns) for image in range(self.images)])
            lengths.append(len(columns))
            start = self.next if positions == "original" else len(columns)
            width = len(columns[0].position)
            tail = [Column(-1, state, (start + i,) * width) for i, state in enumerate(states)]
            through = self.through(layer, columns + tail)
            columns, states = through[: len(columns)], [c.state for c in through[len(columns) :]]
        last = torch.stack([columns[-1].state, *states])
        logits = self.norm(last, self.decoder.norm.weight) @ self.model.lm_head.weight.T
        numbers = [[c.number for c in columns if c.image == image] for image in range(self.images)]
        return Found([[n for n in each if n is not None] for each in numbers], layers, lengths, logits)

    def scores(
        self, layer: Any, columns: list[Column], rows: dict[int, list[int]], grain: int | None
    ) -> dict[int, list[float]]:
        """Of the tokens of each image: attention of its rows (those of the last token, if it has none)."""
        mean = self.weights(layer, columns)[0].mean(0)
        found = {}
        for image in range(self.images):
            asks = [row for row, c in enumerate(columns) if c.at in rows.get(image, [])]
            asks = asks or [len(columns) - 1]
            found[image] = [
                sum(float(mean[row, at]) for row in asks) / len(asks)
                for at, c in enumerate(columns)
                if c.image == image
            ]
            if grain is not None:
                found[image] = [round(score * grain) / grain for score in found[image]]
        return found

    def asking(self, columns: list[Column], rows: dict[int, list[int]], image: int) -> list[int]:
        """Places of the columns that ask for an image."""
        return [row for row, c in enumerate(columns) if c.at in rows.get(image, [])] or [len(columns) - 1]

    def key_lengths(
        self, layer: Any, columns: list[Column], rows: dict[int, list[int]]
    ) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        """Of the tokens of each image, and of the words that ask for it."""
        states = self.norm(torch.stack([c.state for c in columns]), layer.input_layernorm.weight)
        made = states @ layer.self_attn.k_proj.weight.T
        if layer.self_attn.k_proj.bias is not None:
            made = made + layer.self_attn.k_proj.bias
        heads = made.view(len(columns), self.config.num_key_value_heads, -1).transpose(0, 1)
        keys = self.rotated(heads, [c.position for c in columns]).abs().sum((0, 2)).tolist()
        vision = {i: [keys[at] for at, c in enumerate(columns) if c.image == i] for i in range(self.images)}
        return vision, {i: [keys[at] for at in self.asking(columns, rows, i)] for i in range(self.images)}

    def least_alike(
        self, columns: list[Column], rows: dict[int, list[int]], keys: dict[int, list[float]],
        words: dict[int, list[float]], steps: Sequence[tuple[int, int]],
    ) -> dict[int, list[float]]:  # fmt: skip
        """1 for the tokens that DART keeps, 0 for others."""
        normed = self.norm(torch.stack([c.state for c in columns]), self.decoder.norm.weight)
        unit = normed / normed.norm(dim=1, keepdim=True)
        found = {}
        for image in range(self.images):
            vision, kept = [at for at, c in enumerate(columns) if c.image == image], steps[image][0]
            order = sorted(range(len(vision)), key=lambda n: (-keys[image][n], n))
            chosen = order[: min(4, kept)]
            asks = self.asking(columns, rows, image)
            long = sorted(range(len(asks)), key=lambda n: (-words[image][n], n))[:4]
            pivots = [vision[n] for n in chosen] + [asks[n] for n in long]
            rest = kept - len(chosen)
            for place, pivot in enumerate(pivots):
                more = rest // len(pivots) + (place < rest % len(pivots))
                left = [n for n in range(len(vision)) if n not in chosen]
                chosen = chosen + sorted(left, key=lambda n: (float(unit[pivot] @ unit[vision[n]]), n))[:more]
            found[image] = [float(n in chosen) for n in range(len(vision))]
        return found

    def few_heads(
        self, layer: Any, columns: list[Column], rows: dict[int, list[int]], least: float | None
    ) -> dict[int, list[float]]:
        """Attention less the pull of near positions, of 14 of 32 heads."""
        weights = self.weights(layer, columns)[0]
        width = layer.self_attn.head_dim
        ones = self.rotated(torch.ones(1, len(columns), width), [c.position for c in columns])[0]
        near = ones @ ones.T / width
        near = near.clamp(min=least) if least is not None else torch.where(near.abs() < 1e-6, 1e-6, near)
        weights = weights / near
        found = {}
        for image in range(self.images):
            asks = self.asking(columns, rows, image)
            vision = [at for at, c in enumerate(columns) if c.image == image]
            part = weights[:, asks][:, :, vision]
            looks = part.sum((1, 2)).tolist()
            heads = sorted(range(len(looks)), key=lambda h: (-looks[h], h))[: max(1, round(14 * len(looks) / 32))]
            found[image] = part[heads].mean((0, 1)).tolist()
        return found

    def bits(self, layer: Any, columns: list[Column], rows: dict[int, list[int]]) -> list[float]:
        """Mutual information of the words and the tokens of each image, over heads."""
        weights, found = self.weights(layer, columns)[0].double(), []
        for image in range(self.images):
            asks = self.asking(columns, rows, image)
            vision = [at for at, c in enumerate(columns) if c.image == image]
            total = 0.0
            for head in weights[:, asks][:, :, vision].tolist():
                tokens = [sum(row[n] for row in head) / len(asks) for n in range(len(vision))]
                for row in head:
                    for given, token in zip(row, tokens, strict=True):
                        both = given / len(asks)
                        total += both * math.log2(max(1e-6, both / (token / len(asks) + 1e-6)))
            found.append(total)
        return found


# --- Spec sheets -----------------------------------------------------------------------------------------------------


def raters_of(columns: list[Column], images: int, method: str) -> dict[int, list[int]]:
    """Of each image, text after it that the image's tokens look at more than at the mean of that text, or all."""
    found = {}
    for image in range(images):
        vision = [c for c in columns if c.image == image]
        text = [c for c in columns if c.image is None and c.at > vision[-1].at]
        received = [0.0] * len(text)
        for token in vision:
            products = [float(token.state @ word.state) for word in text]
            top = max(products, default=0.0)
            total = sum(math.exp(p - top) for p in products)
            for i, product in enumerate(products):
                received[i] += math.exp(product - top) / total / len(vision)
        mean = sum(received) / max(1, len(received))
        rates = [word.at for word, each in zip(text, received, strict=True) if each > mean + 1e-9]
        if method in ("dart", "autoprune"):
            rates = []
        found[image] = rates or [word.at for word in text]
    return found


def dropped(
    columns: list[Column], scores: dict[int, list[float]], steps: Sequence[tuple[int, int]], positions: str, *,
    noise: bool = False,
) -> list[Column]:  # fmt: skip
    """The best of each image stay in their order; what is merged from the others comes right after them."""
    after: list[Column] = []
    for place, column in enumerate(columns):
        if column.image is None:
            after.append(column)
        elif place == 0 or columns[place - 1].image != column.image:
            image = column.image
            tokens = [c for c in columns if c.image == image]
            best = sorted(range(len(tokens)), key=lambda i: -scores[image][i])
            kept, merged = steps[image]
            after += [tokens[i] for i in sorted(best[:kept])]
            others = sorted(best[kept:])
            if merged:
                after += merge([tokens[i] for i in others], [scores[image][i] for i in others], merged, noise=noise)
    if positions == "original":
        return after
    return [replace(c, position=(i,)) for i, c in enumerate(after)]


def merge(tokens: list[Column], scores: list[float], number: int, *, noise: bool) -> list[Column]:
    """Density peaks among the best three tenths of what is dropped, and one; the mean of each cluster."""
    order = sorted(range(len(tokens)), key=lambda i: -scores[i])
    chosen = [tokens[i] for i in order[: int(0.3 * len(tokens)) + 1]]
    assert number == int(len(chosen) / 10) + 1
    centres, belongs = peaks([c.state for c in chosen], number, noise=noise)
    found = []
    for rank, centre in enumerate(centres):
        members = torch.stack([c.state for c, b in zip(chosen, belongs, strict=True) if b == rank])
        found.append(replace(chosen[centre], state=members.mean(0), number=None))
    return found


def peaks(states: Sequence[Tensor], number: int, *, noise: bool = False) -> tuple[list[int], list[int]]:
    """Centres, and the rank of the centre that each state falls to. Of equals the first."""
    count, width = len(states), len(states[0])
    far = [[math.dist(a.tolist(), b.tolist()) / math.sqrt(width) for b in states] for a in states]
    density = [math.exp(-sum(d * d for d in sorted(row)[:number]) / number) for row in far]
    if noise:
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(0))
        density = [d + 1e-6 * float(n) for d, n in zip(density, drawn, strict=True)]
    most = max(max(row) for row in far)
    reach = []
    for i in range(count):
        denser = [j for j in range(count) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        reach.append(min([far[i][j] for j in denser], default=most))
    centres = sorted(range(count), key=lambda i: -reach[i] * density[i])[:number]
    belongs = [centres.index(i) if i in centres else min(range(number), key=lambda c: far[i][centres[c]])
               for i in range(count)]  # fmt: skip
    return centres, belongs
