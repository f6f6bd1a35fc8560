"""What a pruned prompt should be, from the unpruned model: the embeddings that its language model reads, without the
columns that go. Which go, and what positions the others get, is counted here in plain loops.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import ocvtp
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.vlms import family_of

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 6, "do_sample": False}
KEEP = 3
METHODS = ["random", "oc-vtp"]


def untrained(vlm: Any, seed: int = 0) -> OCPruner:
    """A pruner for layer 2 with random weights."""
    torch.manual_seed(seed)
    return OCPruner(PrunerConfig(family_of(vlm.model).facts.width, grid=(4, 4))).eval()


def prune(vlm: Any, method: str, keep: Any, **options: Any) -> Any:
    if method == "oc-vtp":
        options |= {"pruner": untrained(vlm), "layer": 2}
    return ocvtp.prune(vlm.model, method, keep, **options)


def read_by(vlm: Any, one: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Embeddings [1, L, D] and positions [P, L] of one unpruned prompt in front of the language model, and the rest."""
    seen: dict[str, Any] = {}
    hook = vlm.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    vlm.model(**one)
    hook.remove()
    embeddings, places = seen["inputs_embeds"], seen.get("position_ids")
    return embeddings, torch.arange(embeddings.shape[1])[None] if places is None else places[-3:, 0], seen


ALWAYS = -1000
"""The newline after an image of OneVision in one tile."""


def places_of(vlm: Any, one: Any) -> list[list[int]]:
    """For each image of a prompt the number of the token that each placeholder stands for; -row - 1 for newlines."""
    kind = vlm.model.config.model_type
    if kind in ("llava", "gemma3"):
        return [list(range(16)) for _ in one.get("pixel_values", [])]
    if kind == "smolvlm":
        return [list(range(4)) for _ in (one["pixel_values"][0] if "pixel_values" in one else [])]
    if kind == "internvl":
        runs = "".join("x" if token == vlm.model.config.image_token_id else " " for token in one["input_ids"][0])
        return [list(range(len(run))) for run in runs.split()]
    if kind in ("qwen2_5_vl", "qwen3_vl"):
        return [list(range(int(h * w) // 4)) for _, h, w in one.get("image_grid_thw", [])]
    found = []
    for height, width in one["image_sizes"].tolist() if "image_sizes" in one else []:
        if kind == "llava_onevision" and int(one["batch_num_images"][0]) > 1:
            found.append([*range(16), ALWAYS])
            continue
        best = max(vlm.model.config.image_grid_pinpoints, key=lambda p: fits(p, height, width))
        rows, columns = best[0] // 14, best[1] // 14
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
        ratio = (rows * columns / (2 * 16)) ** 0.5  # `anyres_max_2`
        if kind == "llava_onevision" and ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        numbers = list(range(16))
        for row in range(rows):
            numbers += [*range(16 + row * columns, 16 + (row + 1) * columns), -row - 1]
        found.append(numbers)
    return found


def fits(pinpoint: list[int], height: int, width: int) -> tuple[int, int]:
    """How much of an image's resolution is there, then how little is wasted."""
    scale = min(pinpoint[1] / width, pinpoint[0] / height)
    used = min(int(width * scale) * int(height * scale), width * height)
    return used, -(pinpoint[0] * pinpoint[1] - used)


def stays(numbers: list[int], kept: list[int]) -> list[bool]:
    """Which placeholders of an image stay: those of kept tokens, and newlines of rows with a kept token."""
    answer, row_has = [], False
    for number in numbers:
        if number == ALWAYS:
            answer.append(True)
        elif number < 0:
            answer.append(row_has)
            row_has = False
        else:
            answer.append(number in kept)
            # Rows of LLaVA-NeXT begin after the 16 tokens of the whole image.
            row_has = (row_has or number in kept) and number >= 16
    return answer


def columns_and_positions(
    vlm: Any, one: Any, kept: list[list[int]], places: Tensor, mode: str
) -> tuple[list[int], Tensor, int]:
    """Columns that stay of one prompt, their positions, and the next one."""
    ids, token = one["input_ids"][0].tolist(), vlm.model.config.image_token_id
    flags = [stays(numbers, mine) for numbers, mine in zip(places_of(vlm, one), kept, strict=True)]
    image, inside, columns, owner = 0, 0, list[int](), list[int]()
    for column, each in enumerate(ids):
        if each != token:
            columns.append(column)
            owner.append(-1)
            continue
        if flags[image][inside]:
            columns.append(column)
            owner.append(image)
        inside += 1
        if inside == len(flags[image]):
            image, inside = image + 1, 0
    assert image == len(kept)
    if mode == "original":
        return columns, places[:, columns], int(places.max()) + 1
    if len(places) == 1:
        return columns, torch.arange(len(columns))[None], len(columns)
    made, at, done = list[list[int]](), 0, 0
    while done < len(columns):
        if owner[done] < 0:
            made.append([at] * 3)
            at, done = at + 1, done + 1
            continue
        members = [i for i in range(done, len(columns)) if owner[i] == owner[done]]
        lines = [sorted({int(places[axis, columns[i]]) for i in members}) for axis in range(3)]
        made += [[at + lines[axis].index(int(places[axis, columns[i]])) for axis in range(3)] for i in members]
        at, done = at + max(map(len, lines)), done + len(members)
    return columns, torch.tensor(made).T, at


def taught(vlm: Any, one: Any, kept: list[list[int]], answer: Tensor, mode: str) -> Tensor:
    """Logits of each token of an answer after a prompt that never had the dropped tokens, in one pass."""
    embeddings, places, seen = read_by(vlm, one)
    columns, positions, following = columns_and_positions(vlm, one, kept, places, mode)
    whole = torch.cat([embeddings[:, columns], vlm.model.get_input_embeddings()(answer[None, :-1])], 1)
    more = torch.arange(following, following + len(answer) - 1).expand(len(positions), -1)
    positions = torch.cat([positions, more], 1)[:, None]
    images = (one["input_ids"][0] == vlm.model.config.image_token_id).tolist()
    extra: dict[str, Any] = {"attention_mask": torch.ones(whole.shape[:2], dtype=torch.long)}
    if seen.get("deepstack_visual_embeds") is not None:
        numbers = [sum(images[:column]) for column in columns if images[column]]
        flags = [images[column] for column in columns] + [False] * (len(answer) - 1)
        extra |= {
            "visual_pos_masks": torch.tensor([flags]),
            "deepstack_visual_embeds": [plane[numbers] for plane in seen["deepstack_visual_embeds"]],
        }
    if vlm.model.config.model_type == "gemma3":
        blocks = [sum(images[i] and not images[i - 1] for i in range(1, c + 1)) if images[c] else 0 for c in columns]
        extra["attention_mask"] = both_ways(blocks + [0] * (len(answer) - 1))
    hidden = vlm.model.get_decoder()(
        inputs_embeds=whole, position_ids=positions[0] if len(positions) == 1 else positions, **extra
    ).last_hidden_state
    return vlm.model.lm_head(hidden)[0, len(columns) - 1 :]


def both_ways(blocks: list[int]) -> dict[str, Tensor]:
    """Gemma 3's masks, [1, 1, S, S]: what comes before, and all of one's own image; some layers see eight columns."""
    size = len(blocks)
    full, near = torch.zeros(size, size, dtype=torch.bool), torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            full[query, key] = key <= query or blocks[query] == blocks[key] > 0
            near[query, key] = full[query, key] and key > query - 8
    return {"full_attention": full[None, None], "sliding_attention": near[None, None]}
