"""TRIM against its description in plain loops and against a whole `CLIPModel`, whose vision tower is the VLM's."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, PreTrainedTokenizerFast

import ocvtp
from ocvtp.errors import BadInput, Incompatible, NotAvailable
from ocvtp.methods import entry_of, options_of
from ocvtp.methods.text_tower import TextTower
from ocvtp.methods.trim import Trim
from ocvtp.vlms.images import Part

LENGTH = 9
"""Tokens that the text tower reads: fewer than some questions have."""


def clip_tokenizer() -> PreTrainedTokenizerFast:
    words = "[pad] [unk] what is this red blue square how many are there in the image ? : [start] [end]".split()
    start, end = len(words) - 2, len(words) - 1  # the end has the highest number, as in CLIP: models look for that
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[unk]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[start] $A [end]", special_tokens=[("[start]", start), ("[end]", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="[start]", eos_token="[end]", pad_token="[pad]", unk_token="[unk]"
    )


def make_clip(vlm: Any, seed: int = 0) -> CLIPModel:
    vision = vlm.model.config.vision_config
    text = CLIPTextConfig(
        vocab_size=24,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=16,
        pad_token_id=0,
        bos_token_id=17,
        eos_token_id=18,
    )
    torch.manual_seed(seed)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 * parameter[0].numel() ** -0.5)
    loaded = clip.vision_model.load_state_dict(vlm.model.model.vision_tower.state_dict(), strict=False)
    assert not loaded.missing_keys
    torch.nn.init.normal_(clip.vision_model.post_layernorm.weight)
    return clip.eval()


def slowly(
    images_NP: Tensor, text_P: Tensor, values_NV: Tensor, keep: int, *, reference: bool,
    cosine: bool = False,
) -> tuple[list[int], Tensor]:  # fmt: skip
    scores = []
    for image_P in images_NP:
        score = sum(float(a) * float(b) for a, b in zip(image_P, text_P, strict=True))
        if cosine:
            score /= float(image_P.norm()) * float(text_P.norm())
        scores.append(score)
    picked = sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[: keep - 1])
    dropped = [i for i in range(len(scores)) if i not in picked]
    mean = torch.stack([values_NV[i] for i in dropped]).mean(0)
    rows = [(i, values_NV[i]) for i in picked]
    rows = [*rows, (dropped[-1], mean)] if reference else sorted([*rows, (dropped[-1], mean)], key=lambda row: row[0])
    return sorted(i for i, _ in rows), torch.stack([value for _, value in rows])


@pytest.mark.parametrize("behaviour", ["default", "reference"])
@pytest.mark.parametrize("keep", [1, 2, 5, 9, 13, 16])
@torch.no_grad()
def test_on_models(vlm: Any, pictures: Any, tools: Any, keep: int, behaviour: str) -> None:
    family = tools.family(vlm)
    if not family.facts.cls:
        with pytest.raises(Incompatible, match="trim needs a CLIP tower"):
            ocvtp.prune(vlm.model, "trim", keep)
        return
    clip, words = make_clip(vlm), clip_tokenizer()
    seen = tools.prune(
        vlm, pictures, "trim", keep, behaviour=behaviour, clip=clip, clip_tokenizer=words,
        tokenizer=vlm.processor.tokenizer,
    )  # fmt: skip
    vision = family.encode(family.images(pictures), {family.facts.feature_layer})
    texts = vlm.processor.tokenizer.batch_decode(pictures["input_ids"], skip_special_tokens=True)
    assert len(set(texts)) == 8
    for image in range(8):
        asked = words(texts[image].replace("<image>", "").strip(), truncation=True, max_length=LENGTH).input_ids
        states = clip.text_model(input_ids=torch.tensor([asked])).last_hidden_state[0]
        text = clip.text_projection(states[asked.index(words.eos_token_id)])
        tokens = vision.tokens(family.facts.feature_layer, [image])[0]
        features = clip.visual_projection(clip.vision_model.post_layernorm(tokens))
        expected, rows = slowly(features, text, vision.values([image])[0], keep, reference=behaviour == "reference")
        assert seen.kept[image] == expected
        torch.testing.assert_close(seen.values[image], rows, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_are_projected_as_by_clip(make_vlm: Callable[..., Any], picture_of: Any, tools: Any) -> None:
    """CLIP's own image embedding of CLS, with a patch in its place."""
    llava = make_vlm("llava")
    clip, words = make_clip(llava), clip_tokenizer()
    inputs = llava.prompt([[picture_of(seed)] for seed in range(5)], ["red square"] * 5)
    seen = tools.prune(llava, inputs, "trim", 6, clip=clip, clip_tokenizer=words, tokenizer=llava.processor.tokenizer)
    states = clip.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    ids = words(["red square"], return_tensors="pt").input_ids
    text = clip(input_ids=ids, pixel_values=inputs["pixel_values"][:1]).text_embeds[0]
    for image in range(5):
        features = clip.visual_projection(clip.vision_model.post_layernorm(states[image, 1:]))
        assert seen.kept[image] == slowly(features, text, states[image, 1:], 6, reference=False)[0]


class Identity(torch.nn.Module):
    def forward(self, given: Tensor) -> Tensor:
        return given


def made_of_numbers(tools: Any, text: Tensor, **options: Any) -> Trim:
    """A TRIM whose CLIP changes nothing, for questions that all mean `text`."""
    layer = Identity()
    layer.weight = torch.zeros(())
    clip = SimpleNamespace(
        vision_model=SimpleNamespace(post_layernorm=Identity()), visual_projection=Identity(), text_projection=layer,
        text_model=None, config=SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=LENGTH)),
    )  # fmt: skip
    tokenizer = SimpleNamespace(batch_decode=lambda prompts, **_: ["" for _ in prompts])
    entry = entry_of("trim")
    filled = {"similarity": "dot", "rank": "similarity", "mean": "place", **options}
    tower = TextTower(clip, None, tokenizer)
    made = Trim(tower, tools.facts.feature_layer, options_of(entry, filled))
    tower.embed = lambda questions, device: text.expand(len(questions), -1)  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("name", ["square", "wide", "tiles", "cut"])
@pytest.mark.parametrize("mean", ["place", "end"])
def test_ties(tools: Any, name: str, mean: str) -> None:
    text = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.0])
    for seed in range(5):
        vision = tools.numbers(tools.layouts[name], seed=seed)
        tokens, values = vision.tokens(5, [0, 1, 2]), vision.values([0, 1, 2])
        for keep in (1, 2, 7, vision.count - 1, vision.count):
            indices, given = tools.choose(made_of_numbers(tools, text, mean=mean), vision, keep)
            for image in range(3):
                scores = [(float(tokens[image, i] @ text), i) for i in range(vision.count)]
                picked = sorted(i for _, i in sorted(scores)[: keep - 1])
                dropped = [i for i in range(vision.count) if i not in picked]
                order = [*picked, dropped[-1]] if mean == "end" else sorted([*picked, dropped[-1]])
                assert indices[image].tolist() == sorted(order)
                for place, number in enumerate(order):
                    expected = values[image, dropped].mean(0) if number == dropped[-1] else values[image, number]
                    torch.testing.assert_close(given[image, place], expected, atol=1e-5, rtol=0)


def test_softmax_makes_those_far_behind_equal(tools: Any) -> None:
    text, layout = torch.tensor([1.0]), (Part(0, (1, 6)),)
    scores = torch.tensor([400.0, 0.0, 300.0, 200.0, 90.0, 500.0])
    kept = {}
    for rank in ("similarity", "softmax"):
        vision = tools.numbers(layout, images=1)
        vision.tokens = lambda layer, members: scores[None, :, None]
        kept[rank] = tools.choose(made_of_numbers(tools, text, rank=rank, mean="end"), vision, 4)[0][0].tolist()
    assert kept["similarity"] == [1, 3, 4, 5]  # 5 stands for the mean
    assert kept["softmax"] == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("USER: \nWhat is this?\nAnswer shortly. ASSISTANT:", "What is this?\nAnswer shortly."),
        ("A chat with a user. USER: How many? ASSISTANT: two</s>USER: Of what? ASSISTANT:", "Of what?"),
        ("[INST] \nWhat is this? [/INST]", "What is this?"),
        (" what is this ? ", "what is this ?"),
        ("USER: ASSISTANT:", ""),
    ],
)
def test_the_question_is_cut_out_of_the_prompt(tools: Any, prompt: str, question: str) -> None:
    made = made_of_numbers(tools, torch.ones(5))
    made.tower._tokenizer = SimpleNamespace(batch_decode=lambda prompts, **_: [prompt for _ in prompts])
    assert made.tower.questions([[1]]) == [question]


@torch.no_grad()
def test_it_comes_from_a_folder(
    make_vlm: Callable[..., Any], picture_of: Any, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llava = make_vlm("llava")
    clip, words = make_clip(llava), clip_tokenizer()
    clip.save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    llava.processor.tokenizer.save_pretrained(tmp_path / "vlm")
    inputs = llava.prompt([[picture_of(seed)] for seed in range(4)])
    own = llava.processor.tokenizer
    expected = tools.prune(llava, inputs, "trim", 6, clip=clip, clip_tokenizer=words, tokenizer=own)
    seen = tools.prune(llava, inputs, "trim", 6, clip=tmp_path / "clip", tokenizer=str(tmp_path / "vlm"))
    assert seen.kept == expected.kept
    entry = SimpleNamespace(name="mine", folder=tmp_path / "vlm", text_tower=str(tmp_path / "clip"))
    monkeypatch.setattr(llava.model, "ocvtp_entry", entry, raising=False)
    assert tools.prune(llava, inputs, "trim", 6).kept == expected.kept


def test_without_a_text_tower_it_is_refused(make_vlm: Callable[..., Any], tools: Any, tmp_path: Path) -> None:
    llava = make_vlm("llava")
    with pytest.raises(NotAvailable, match=r"this VLM has no text tower, and trim needs .*: give clip="):
        ocvtp.prune(llava.model, "trim", 6)
    with pytest.raises(NotAvailable, match=r"a CLIPModel is not in .*nowhere"):
        ocvtp.prune(llava.model, "trim", 6, clip=str(tmp_path / "nowhere"))
    clip, words = make_clip(llava), clip_tokenizer()
    with pytest.raises(BadInput, match="give tokenizer="):
        ocvtp.prune(llava.model, "trim", 6, clip=clip, clip_tokenizer=words)
    with pytest.raises(BadInput, match="trim needs clip_tokenizer"):
        ocvtp.prune(llava.model, "trim", 6, clip=clip)
    other = CLIPModel(CLIPConfig(text_config=clip.config.text_config.to_dict(), vision_config={
        **clip.config.vision_config.to_dict(), "hidden_size": 48}))  # fmt: skip
    with pytest.raises(Incompatible, match="has width 48, but that of the VLM 32"):
        ocvtp.prune(llava.model, "trim", 6, clip=other, clip_tokenizer=words)
    for wrong in ({"similarity": "euclid"}, {"rank": 1}, {"mean": "first"}):
        with pytest.raises(BadInput, match=f"trim has no {next(iter(wrong))}="):
            ocvtp.prune(llava.model, "trim", 6, clip=clip, **wrong)
    assert "_ocvtp_handle" not in llava.model.__dict__


def test_tiny_llava_is_refused_by_name() -> None:
    vlm = ocvtp.vlms.load("tiny-llava")
    with pytest.raises(NotAvailable, match="tiny-llava has no text tower"):
        ocvtp.prune(vlm.model, "trim", 16)
