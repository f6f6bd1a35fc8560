"""What else is done with a model that is pruned: offloaded, wrapped, adapted, saved, used as a draft."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from PIL import Image
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, LlavaForConditionalGeneration

import ocvtp
from ocvtp import OCPruner
from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods import REGISTRY
from ocvtp.methods.inside import Inside, PruneStage, Scored, Step
from ocvtp.pruner import PrunerConfig
from ocvtp.pruning.options import Options
from ocvtp.vlms import load
from ocvtp.vlms.families import FAMILIES, family_of

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 4, "do_sample": False}
MAKERS = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3", "smolvlm")


def pair(vlm: Any, picture_of: Picture) -> Any:
    return vlm.prompt([[picture_of(0)], [picture_of(1, 120, 60)]])


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("method", ["visionzip", "oc-vtp-untrained"])
@torch.no_grad()
def test_weights_may_lie_elsewhere(family: str, method: str, make_vlm: Any, picture_of: Picture) -> None:
    """On `meta`, until accelerate's hooks fetch them for the call of the module that they belong to."""
    vlm = make_vlm(family, 0)
    inputs, options = pair(vlm, picture_of), {} if method == "visionzip" else {"layer": 2}
    with ocvtp.prune(vlm.model, method, 0.5, **options) as handle:
        expected, kept = vlm.model(**inputs).logits, handle.last_kept
    accelerate.cpu_offload(vlm.model, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in vlm.model.parameters())
    with ocvtp.prune(vlm.model, method, 0.5, **options) as handle:
        found = vlm.model(**inputs).logits
    assert handle.last_kept == kept
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("family", "keep"),
    [("qwen2_5_vl", 20), ("qwen3_vl", 20), ("internvl", 10), ("llava_next", 40), ("llava_onevision", 36)],
)
@torch.no_grad()
def test_an_image_with_fewer_tokens_than_keep_keeps_them(
    family: str, keep: int, make_vlm: Any, picture_of: Picture
) -> None:
    """A small image beside a large one, with methods for all of an image and for each tile of it."""
    vlm = make_vlm(family, 0)
    inputs = vlm.prompt([[picture_of(0, 56, 56)], [picture_of(1, 200, 100)]])
    adapter = family_of(vlm.model)
    whole, more = adapter.counts(adapter.images(inputs))
    assert whole <= keep < more
    for method in ("random", "css", "visionzip"):
        with ocvtp.prune(vlm.model, method, keep) as handle:
            vlm.model(**inputs)
        assert [len(kept) for kept in handle.last_kept] == [whole, keep]
    if family == "qwen2_5_vl":
        with ocvtp.prune(vlm.model, "pyramiddrop", keep) as handle:
            vlm.model(**inputs)
        assert len(handle.last_kept[0]) == whole
        assert 0 < len(handle.last_kept[1]) < more


@pytest.mark.parametrize("family", ["llava", "gemma3", "smolvlm"])
def test_keep_is_at_most_what_every_image_has(family: str, make_vlm: Any) -> None:
    vlm = make_vlm(family, 0)
    with pytest.raises(BadInput, match=f"keep is {vlm.tokens + 1}, but an image has {vlm.tokens} tokens"):
        ocvtp.prune(vlm.model, "random", vlm.tokens + 1)


@pytest.mark.parametrize("family", MAKERS)
@torch.no_grad()
def test_images_of_a_size_that_the_tower_cannot_see_are_refused(
    family: str, make_vlm: Any, picture_of: Picture
) -> None:
    """Before it runs: tiles that are too small, and images of less than a token."""
    vlm = make_vlm(family, 0)
    inputs = vlm.prompt([[picture_of(0)]])
    ran = []
    hook = family_of(vlm.model).tower.register_forward_pre_hook(lambda *_: ran.append(1))
    if family.startswith("qwen"):
        made = inputs | {"image_grid_thw": torch.tensor([[1, 1, 2]]), "pixel_values": inputs["pixel_values"][:2]}
        message = "image_grid_thw has 1 x 1 x 2 patches: a token is made of 2 x 2"
    elif family == "smolvlm":  # whose tokens follow from the size
        made = inputs | {"pixel_values": inputs["pixel_values"][..., :13, :13]}
        message = "1 images of 0 tokens need 0 placeholders"
    else:
        side = inputs["pixel_values"].shape[-1]
        made = inputs | {"pixel_values": inputs["pixel_values"][..., :13, :13]}
        message = f"pixel_values of 13 x 13 pixels, but the vision tower sees {side} x {side}"
    with ocvtp.prune(vlm.model, "random", 2), pytest.raises(BadInput, match=message):
        vlm.model(**made)
    hook.remove()
    assert not ran


@torch.no_grad()
def test_what_was_laid_over_forward_stays_when_pruning_goes(make_vlm: Any, picture_of: Picture) -> None:
    vlm = make_vlm("llava", 0)
    inputs = pair(vlm, picture_of)
    plain = vlm.model(**inputs).logits

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            Count.calls += 1
            return args, kwargs

    handle = ocvtp.prune(vlm.model, "random", 5)
    add_hook_to_module(vlm.model, Count())
    assert vlm.model(**inputs).logits.shape[1] < plain.shape[1]
    handle.remove()
    assert torch.equal(vlm.model(**inputs).logits, plain)
    assert Count.calls == 2
    with ocvtp.prune(vlm.model, "random", 5):
        assert vlm.model(**inputs).logits.shape[1] < plain.shape[1]
    remove_hook_from_module(vlm.model)
    assert torch.equal(vlm.model(**inputs).logits, plain)


def test_a_removed_handle_is_no_context(llava: Any) -> None:
    handle = ocvtp.prune(llava.model, "random", 5)
    handle.remove()
    with pytest.raises(BadInput, match=r"this handle was removed: .* call ocvtp.prune again"), handle:
        pass


def test_a_pruned_model_is_not_saved_as_a_whole(make_vlm: Any, tmp_path: Path) -> None:
    llava = make_vlm("llava", 0)
    with ocvtp.prune(llava.model, "random", 5):
        for save in (lambda: torch.save(llava.model, tmp_path / "whole.pt"), lambda: copy.deepcopy(llava.model)):
            with pytest.raises(BadInput, match=r"neither be copied nor be saved as a whole: call remove\(\)"):
                save()
        torch.save(llava.model.state_dict(), tmp_path / "weights.pt")
    torch.save(llava.model, tmp_path / "whole.pt")


@pytest.mark.parametrize("family", MAKERS)
@torch.no_grad()
def test_a_model_with_adapters(family: str, make_vlm: Any, picture_of: Picture) -> None:
    vlm = make_vlm(family, 0)
    inputs = pair(vlm, picture_of)
    config = peft.LoraConfig(r=2, target_modules=r".*(language|text)_model.*q_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(vlm.model, config).eval()
    with pytest.raises(BadInput, match=rf"around a {type(vlm.model).__name__}: prune what its get_base_model\(\)"):
        ocvtp.prune(adapted, "random", 3)
    plain = adapted(**inputs).logits
    base = adapted.get_base_model()
    with ocvtp.prune(base, "random", 3) as handle:
        logits, answer = adapted(**inputs).logits, adapted.generate(**inputs, **NEW)
        assert [len(kept) for kept in handle.last_kept] == [3, 3]
        assert torch.equal(answer, base.generate(**inputs, **NEW))
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(**inputs).logits, logits)
    assert torch.equal(adapted(**inputs).logits, plain)


@torch.no_grad()
def test_an_image_a_hundred_times_as_wide_as_high(make_vlm: Any, picture_of: Picture) -> None:
    vlm = make_vlm("llava_next", 0)
    inputs = vlm.prompt([[picture_of(0, 600, 6)]])
    for keep in (0.5, 1.0):
        with ocvtp.prune(vlm.model, "downsample", keep) as handle:
            vlm.model(**inputs)
        assert len(handle.last_kept[0]) == 16 * keep


@torch.no_grad()
def test_the_callers_pruner_stays_as_it_is(llava: Any, picture_of: Picture) -> None:
    torch.manual_seed(0)
    pruner = OCPruner(PrunerConfig(32, grid=(4, 4), decoder=None)).train()
    with ocvtp.prune(llava.model, "oc-vtp", 5, pruner, layer=2):
        llava.model(**pair(llava, picture_of))
    assert pruner.training


def test_what_an_editor_sees() -> None:
    assert {"prune", "OCPruner", "Handle"} <= set(dir(ocvtp))
    taken = {option for entry in REGISTRY.values() for option in entry.options}
    assert taken == set(Options.__annotations__), "ocvtp.pruning.options.Options has the options of all methods"


@torch.no_grad()
def test_a_pruned_model_drafts_for_no_other(make_vlm: Any, picture_of: Picture) -> None:
    plain, draft = make_vlm("llava", 0), make_vlm("llava", 0)
    inputs = plain.prompt([[picture_of(0)]])
    expected = plain.model.generate(**inputs, **NEW)
    # transformers 5.17 comes back to the draft with its cache before it asks for anything else.
    refused = "a pruned model drafts for no other one|as a draft for another model"
    with ocvtp.prune(draft.model, "random", 5), pytest.raises(BadInput, match=refused):
        plain.model.generate(**inputs, **NEW, assistant_model=draft.model)
    with ocvtp.prune(plain.model, "random", 5), pytest.raises(BadInput, match="assisted decoding takes guesses back"):
        plain.model.generate(**inputs, **NEW, assistant_model=draft.model)
    assert torch.equal(plain.model.generate(**inputs, **NEW, assistant_model=draft.model), expected)


# Not SmolVLM, whose processor needs a package that spells numbers.
@pytest.mark.parametrize("family", [*MAKERS[:-1], "tiny_qwen"])
@torch.no_grad()
def test_a_pipeline_of_transformers(family: str, make_vlm: Any, picture_of: Picture) -> None:
    from transformers import pipeline

    vlm = make_vlm(family, 0)
    if vlm.processor.chat_template is None:
        vlm.processor.chat_template = (
            "{% for message in messages %}<s>{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            + vlm.mark
            + "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        )
    pipe = pipeline("image-text-to-text", model=vlm.model, processor=vlm.processor)
    picture = picture_of(0, 96, 96)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "is this"}]}]
    options = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}, "return_full_text": False}
    with ocvtp.prune(vlm.model, "random", 3) as handle:
        (answer,) = pipe(text=chat, **options)
        assert len(handle.last_kept[0]) == 3
        text = vlm.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = vlm.processor(text=[text], images=[[picture]] if vlm.kind == "gemma3" else [picture],
                               return_tensors="pt")  # fmt: skip
        made = vlm.model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"].split() == vlm.processor.batch_decode(made, skip_special_tokens=True)[0].split()


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen"])
@torch.no_grad()
def test_a_device_map(name: str, tmp_path: Path, picture_of: Picture) -> None:
    """Part of the weights on disk, where accelerate leaves them until a module runs."""
    vlm = load(name)
    elsewhere = ["visual"] if name == "tiny-qwen" else ["vision_tower", "multi_modal_projector"]
    places = {"model.language_model": "cpu", "lm_head": "cpu"} | {f"model.{part}": "disk" for part in elsewhere}
    mapped = AutoModelForImageTextToText.from_pretrained(
        vlm.entry.folder, device_map=places, offload_folder=tmp_path, dtype=torch.float32
    ).eval()
    assert {parameter.device.type for parameter in mapped.parameters()} == {"meta", "cpu"}
    content = [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs, answers = vlm.processor(text=text, images=picture_of(0, 96, 96), return_tensors="pt"), []
    for model in (vlm.model, mapped):
        with ocvtp.prune(model, "visionzip", 8) as handle:
            answers.append((model.generate(**inputs, **NEW).tolist(), handle.last_kept))
    assert answers[0] == answers[1]


COMPILED = [
    ("llava", "language model"), ("llava", "tower"),
    *(pytest.param(family, part, marks=pytest.mark.nightly) for family in MAKERS for part in ("language model", "all")
      if (family, part) != ("llava", "language model")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "part"), COMPILED)
@torch.no_grad()
def test_compiled_models(family: str, part: str, make_vlm: Any, picture_of: Picture) -> None:
    """By Dynamo, which is what pruning could get in the way of; what it makes of a graph is another matter."""
    plain, compiled = make_vlm(family, 0), make_vlm(family, 0)
    inputs, model = pair(plain, picture_of), compiled.model
    parts = {"language model": model.get_decoder(), "tower": family_of(model).tower, "all": model}
    parts[part].compile(backend="eager", dynamic=True)
    answers = []
    for each in (plain, compiled):
        with ocvtp.prune(each.model, "random", 3) as handle:
            answers.append((each.model.generate(**inputs, **NEW).tolist(), handle.last_kept))
    assert answers[0] == answers[1]
    if part == "language model" and family == "llava":
        with (
            ocvtp.prune(model, "fastv", 14),
            pytest.raises(BadInput, match=r"by hooks that a compiled language model runs otherwise: load it without"),
        ):
            model.generate(**inputs, **NEW)


@torch.no_grad()
def test_a_conversation_goes_on_by_forward(make_vlm: Any, picture_of: Picture) -> None:
    """Two turns of text on the cache of a pruned prompt, as if all had been one prompt."""
    vlm = make_vlm("qwen3_vl", 0)
    inputs = vlm.prompt([[picture_of(0, 84, 84)]])
    turns = [torch.tensor([[7, 8, 9]]), torch.tensor([[10, 11]])]
    whole = torch.cat([inputs["input_ids"], *turns], 1)
    kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5))
    with ocvtp.prune(vlm.model, "random", 4):
        expected = vlm.model(
            input_ids=whole, mm_token_type_ids=kinds, pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        ).logits  # fmt: skip
        cache, found = vlm.model(**inputs, use_cache=True).past_key_values, []
        for turn in turns:
            found.append(vlm.model(input_ids=turn, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(found, 1), expected[:, -5:], atol=1e-4, rtol=1e-4)
    with ocvtp.prune(vlm.model, "random", 4), pytest.raises(BadInput, match="needs a dynamic cache"):
        vlm.model.generate(**inputs, cache_implementation="static", **NEW)


class ByLength(Inside):
    """The longest hidden states stay."""

    name: ClassVar[str] = "by-length"
    positions: ClassVar[Literal["compact", "original"]] = "compact"
    reads_attention: ClassVar[bool] = False

    def steps(self, tokens: int, keep: int) -> list[Step]:
        return [Step(keep)]

    def score(self, scored: Scored) -> Tensor:
        self.seen = scored
        return scored.states_IND.norm(dim=2)


@torch.no_grad()
def test_a_method_inside_has_scores_of_its_own(llava: Any, picture_of: Picture) -> None:
    inputs = pair(llava, picture_of)
    method = ByLength(4, "reference", [PruneStage(1, 2)])
    states = llava.model(**inputs, output_hidden_states=True).hidden_states[1]
    entry = REGISTRY["fastv"]
    handle = ocvtp.pruning.handle.Handle(
        llava.model, entry, family_of(llava.model), method, ocvtp.methods.Budget.parse(6), 0, None
    )
    with handle:
        llava.model(**inputs)
    images = inputs["input_ids"] == llava.model.config.image_token_id
    for row, kept in enumerate(handle.last_kept):
        assert kept == states[row, images[row]].norm(dim=1).topk(6).indices.sort().values.tolist()
    assert method.seen.attention().shape == method.seen.there_IN.shape == (2, 16)


def test_tokens_to_which_features_are_added_cannot_be_dropped(make_vlm: Any) -> None:
    vlm = make_vlm("qwen3_vl", 0)
    with pytest.raises(Incompatible, match=r"pyramiddrop drops tokens before layer 1 .*DeepStack.* layer 2 or later"):
        ocvtp.prune(vlm.model, "pyramiddrop", 0.5)
    assert "_ocvtp_handle" not in vlm.model.__dict__
    ocvtp.prune(vlm.model, "fastv", 0.9, k=2).remove()


@torch.no_grad()
def test_a_language_model_of_experts(picture_of: Picture, llava: Any) -> None:
    """Before the LLM methods do not care what it is made of; inside it, its attention is as that of others."""
    config = copy.deepcopy(llava.model.config)
    text = config.text_config.to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2}
    config.text_config = CONFIG_MAPPING["mixtral"](
        **{k: v for k, v in text.items() if k not in ("model_type", "rope_parameters")}
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    inputs = pair(llava, picture_of)
    logits = model(**inputs).logits
    for method, keep in (("css", 3), ("fastv", 14)):
        with ocvtp.prune(model, method, 1.0):
            torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
        with ocvtp.prune(model, method, keep) as handle:
            model.generate(**inputs, **NEW)
            assert max(handle.last_layers[-1]) <= keep < handle.last_layers[0][0] or method == "css"
            assert len(handle.last_kept[0]) <= keep


def test_a_class_that_is_not_supported_names_those_that_are() -> None:
    class Other(torch.nn.Module):
        pass

    with pytest.raises(BadInput, match="is a Other, which cannot be pruned") as error:
        ocvtp.prune(Other(), "random", 5)
    assert all(name in str(error.value) for name in (*FAMILIES, "docs/your-own-vlm.md"))
