"""Methods that choose in each tile against their rules in plain loops: ties, tiles, behaviours, and on every family."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import picking_arithmetic as plain
import pytest
import torch
from test_methods_trim import clip_tokenizer, make_clip
from torch import Tensor

import ocvtp
from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods import entry_of, options_of
from ocvtp.methods.cdpruner import relevance
from ocvtp.methods.text_tower import TextTower
from ocvtp.selection.cosines import cosines
from ocvtp.vlms.images import Facts, Part

WIDTH = 12
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3", "smolvlm")
NAMES = [name for name in plain.RULES if name != "cdpruner"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    *((name, {"behaviour": "reference"}) for name in NAMES if "behaviour" in entry_of(name).options),
    ("scope", {"alpha": 0.5, "tiles": "together"}),
    ("divprune", {"tiles": "floor"}),
    ("promprune", {"mu": 0.9}),
    ("promprune", {"mu": 0.1, "tau": 0.5}),
    ("vispruner", {"important": 0.25, "removed": 2}),
    ("vispruner", {"important": 1}),
    ("holov", {"strips": 3, "order": "picked"}),
    ("holov", {"strips": 5, "alpha": 0, "overflow": "lost", "order": "picked"}),
    ("prunesid", {"order": "picked"}),
    ("vscan-before", {"window": 3, "recycle": False}),
]


def made(name: str, facts: Facts, **options: Any) -> Any:
    entry = entry_of(name)
    return entry.build(SimpleNamespace(facts=facts), None, options_of(entry, options))  # type: ignore[arg-type]


def chosen(
    name: str, options: dict[str, Any], layout: Any, owners: list[list[int]], keep: int, seen: dict[str, Tensor],
    cls_TV: Tensor | None,
) -> tuple[list[int], Tensor]:  # fmt: skip
    """Numbers in ascending order, and values in the order in which the LLM reads them, of one image."""
    reference = options.get("behaviour") == "reference"
    tiles = options.get("tiles") or ("floor" if reference else "even")
    order = options.get("order") or ("picked" if reference and "order" in entry_of(name).options else "raster")
    cls = name == "prunesid" and reference and cls_TV is not None
    if tiles == "together":
        owners = [sorted(n for tile in owners for n in tile)]
    more = {"overflow": "lost", "single": "raw"} if name == "holov" and reference else {}
    shares = [keep // len(owners)] * len(owners)
    if tiles == "even":
        shares = [0] * len(owners)
        while sum(shares) < keep:
            room = [t for t in range(len(owners)) if shares[t] < len(owners[t])]
            least = min(shares[t] for t in room)
            shares[next(t for t in room if shares[t] == least)] += 1
    picked, rows, from_cls = list[int](), dict[int, Tensor](), list[int]()
    for number, (tile, share) in enumerate(zip(owners, shares, strict=True)):
        if share >= len(tile):
            picked += tile
            continue
        if not share:
            continue
        own = {key: value[tile] for key, value in seen.items()}
        width = next((part.tile or part.grid)[1] for part in reversed(layout) if tile[0] >= part.start)
        about = plain.Tile(
            own["tokens"], own["projected"], own["attention"].tolist(), own["cosines"][:, tile],
            own["relevance"].tolist() if "relevance" in own else None, own["shallow"].tolist(),
            (len(tile) // width, width),
        )  # fmt: skip
        some = plain.RULES[name](about, share, **{**more, **options, "cls": cls})
        if cls:
            from_cls.append(number)
        picked += [tile[n] for n in some]
        if name == "vscan-before" and options.get("recycle", True):
            kept = sorted(some)
            rest = [n for n in range(len(tile)) if n not in kept]
            near = cosines(about.tokens[None, rest], about.tokens[None, kept])[0].tolist()
            for place, n in enumerate(kept):
                mine = [own["values"][m] for m, row in zip(rest, near, strict=True) if row.index(max(row)) == place]
                rows[tile[n]] = torch.stack([own["values"][n], *mine]).mean(0)
    in_order = sorted(picked) if order == "raster" else picked
    values = [rows.get(n, seen["values"][n]) for n in in_order]
    if from_cls:
        assert cls_TV is not None
        free = [n for n in range(len(seen["values"])) if n not in picked][: len(from_cls)]
        values = [cls_TV[t] for t in from_cls] + values
        if order == "raster":
            both = sorted(zip([*free, *in_order], values, strict=True), key=lambda pair: pair[0])
            return [n for n, _ in both], torch.stack([value for _, value in both])
        picked = picked + free
    return sorted(picked), torch.stack(values) if values else seen["values"][:0]


SEVERAL_TILES = ("tiles", "cut")
CASES = [
    pytest.param(name, options, where, id="-".join([name, *map(str, options), where]))
    for name, options in VARIANTS
    for where in ("square", "wide", *SEVERAL_TILES)
    if where in SEVERAL_TILES or not options.get("tiles")
]


@pytest.mark.parametrize(("name", "options", "where"), CASES)
def test_ties_and_all(tools: Any, name: str, options: dict[str, Any], where: str) -> None:
    layout, owners = tools.layouts[where], tools.owners(tools.layouts[where])
    for seed in range(3):
        facts = tools.facts if seed else tools.without_cls
        block = facts.feature_layer - 1
        vision = tools.numbers(layout, seed=seed, width=WIDTH)
        method = made(name, facts, **options)
        for keep in {len(owners), 7, 12, vision.count * 2 // 5, vision.count}:
            if options.get("behaviour") == "reference" and keep // len(owners) > min(map(len, owners)):
                continue
            if options.get("tiles") == "together" and keep > 40:
                continue
            indices, values = tools.choose(method, vision, keep)
            attention = vision.from_cls if facts.cls else vision.received
            tokens, given = vision.tokens(facts.feature_layer, [0, 1, 2]), vision.values([0, 1, 2])
            shallow = attention(min(round(5 * facts.depth / 24), block), [0, 1, 2])
            cls = vision.cls_values([0, 1, 2]) if facts.cls else None
            for image in range(3):
                seen = {
                    "tokens": tokens[image], "projected": given[image], "values": given[image],
                    "attention": attention(block, [0, 1, 2])[image], "shallow": shallow[image],
                    "cosines": cosines(tokens)[image],
                }  # fmt: skip
                expected, rows = chosen(name, options, layout, owners, keep, seen, None if cls is None else cls[image])
                found = [n for n in indices[image].tolist() if n >= 0]
                assert found == expected
                torch.testing.assert_close(values[image][: len(rows)], rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_on_every_family(make_vlm: Callable[..., Any], picture_of: Any, tools: Any, family: str, name: str) -> None:
    vlm = made_once(make_vlm, family)
    inputs = vlm.prompt([[picture_of(0, 112, 112)], [picture_of(1, 80, 40)]])
    own = tools.family(vlm)
    images, facts = own.images(inputs), own.facts
    block = facts.feature_layer - 1
    shallow = min(round(5 * facts.depth / 24), block)
    vision = own.encode(images, {shallow, block, facts.feature_layer})
    with ocvtp.prune(vlm.model, name, 0.5) as handle:
        vlm.model(**inputs)
        kept = handle.last_kept
    assert len(kept) == len(vision.counts)
    for image, numbers in enumerate(kept):
        attention = vision.from_cls if facts.cls else vision.received
        tokens, values = vision.tokens(facts.feature_layer, [image])[0], vision.values([image])
        seen = {
            "tokens": tokens, "projected": own.project(list(values))[0], "values": values[0],
            "attention": attention(block, [image])[0], "shallow": attention(shallow, [image])[0],
            "cosines": cosines(tokens[None])[0],
        }  # fmt: skip
        layout = vision.layout(image)
        keep = int(0.5 * vision.counts[image] + 0.5)
        expected, _ = chosen(name, {}, layout, tools.owners(layout), keep, seen, None)
        assert numbers == expected


_MADE: dict[str, Any] = {}


def made_once(make_vlm: Callable[..., Any], family: str) -> Any:
    if family not in _MADE:
        _MADE[family] = make_vlm(family)
    return _MADE[family]


@pytest.mark.parametrize("vlm", ["llava", "llava_next"], indirect=True)
@torch.no_grad()
def test_cdpruner_reads_the_question(vlm: Any, pictures: Any, tools: Any) -> None:
    """Questions that the text tower reads at once as CLIP does; longer ones in pieces of their own."""
    clip, words, own = make_clip(vlm), clip_tokenizer(), vlm.processor.tokenizer
    options = {"clip": clip, "clip_tokenizer": words, "tokenizer": own}
    seen = tools.prune(vlm, pictures, "cdpruner", 7, **options)
    family = tools.family(vlm)
    layer = family.facts.feature_layer
    vision = family.encode(family.images(pictures), {layer - 1, layer})
    texts = own.batch_decode(pictures["input_ids"], skip_special_tokens=True)
    several = 0
    for image in range(8):
        ids = words(texts[image].replace("<image>", "").strip(), add_special_tokens=False).input_ids
        pieces = [ids[at : at + 7] for at in range(0, len(ids), 7)]
        several += len(pieces) > 1
        embedded = []
        for piece in pieces:
            states = clip.text_model(input_ids=torch.tensor([[17, *piece, 18]])).last_hidden_state[0, len(piece) + 1]
            embedded.append(plain.unit(clip.text_projection(states)[None])[0])
        tokens = vision.tokens(layer, [image])[0]
        features = plain.unit(clip.visual_projection(clip.vision_model.post_layernorm(tokens)))
        against = -torch.stack([features @ text for text in embedded]).mean(0)
        scaled = (against - against.min() + 1e-6) / (against.max() - against.min())
        attention = torch.zeros(len(tokens))
        data = {
            "tokens": tokens, "projected": tokens, "values": tokens, "attention": attention, "shallow": attention,
            "cosines": cosines(tokens[None])[0], "relevance": scaled,
        }  # fmt: skip
        layout = vision.layout(image)
        expected, _ = chosen("cdpruner", {}, layout, tools.owners(layout), 7, data, None)
        assert seen.kept[image] == expected
    assert several
    assert TextTower(clip, words, own).embed_whole(["red", "blue", "red"], torch.device("cpu")).shape == (3, 16)
    assert bool(relevance(torch.ones(1, 4, 3), torch.ones(1, 3)).isfinite().all())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scope", {"alpha": "1"}), ("scope", {"tiles": "odd"}), ("holov", {"strips": 0}),
        ("holov", {"overflow": "all"}),
        ("promprune", {"tau": 0}), ("vispruner", {"important": 2}), ("vispruner", {"removed": 0}),
        ("prunesid", {"cls": 1}), ("prunesid", {"order": "any"}), ("vscan-before", {"tiles": "together"}),
        ("divprune", {"tiles": None}), ("cdpruner-no-text", {"behaviour": "old"}),
    ],
)  # fmt: skip
def test_options(tools: Any, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"{'vscan' if 'vscan' in name else name} has no {next(iter(options))}="):
        made(name, tools.facts, **options)


def test_a_tower_without_cls_hands_none_on(tools: Any) -> None:
    with pytest.raises(Incompatible, match="prunesid cannot hand CLS on"):
        made("prunesid", tools.without_cls, cls=True)
    made("prunesid", tools.without_cls, behaviour="reference")


def test_authors_numbers(tools: Any) -> None:
    """24 x 24 tokens: windows of VScan, groups of PruneSID, strips of HoloV at 64, 128 and 192 tokens."""
    vision = tools.numbers((Part(0, (24, 24)),), images=1, width=40)
    for keep in (64, 128, 192):
        for name in NAMES:
            found, _ = tools.choose(made(name, tools.facts), vision, keep)
            assert found.shape == (1, keep)
            assert len({*found[0].tolist()}) == keep
    found, _ = tools.choose(made("vscan-before", tools.facts), vision, 96)
    windows = [n // 24 // 6 * 4 + n % 24 // 6 for n in found[0].tolist()]
    assert min(windows.count(w) for w in range(16)) >= 3
