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

import ocvtp
from ocvtp import OCPruner
from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods import REGISTRY
from ocvtp.methods.inside import Inside, PruneStage, Scored, Step
from ocvtp.pruner import PrunerConfig
from ocvtp.pruning.options import Options
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


@torch.no_grad()
def test_an_image_with_fewer_tokens_than_keep_keeps_them(make_vlm: Any, picture_of: Picture) -> None:
    vlm = make_vlm("qwen2_5_vl", 0)
    inputs = vlm.prompt([[picture_of(0, 56, 56)], [picture_of(1, 200, 100)]])
    for method in ("random", "css", "pyramiddrop"):
        with ocvtp.prune(vlm.model, method, 20) as handle:
            vlm.model(**inputs)
        small, large = (len(kept) for kept in handle.last_kept)
        assert small == 16
        assert large == 20 or (method == "pyramiddrop" and 0 < large < 28)


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


@torch.no_grad()
def test_a_model_with_adapters(make_vlm: Any, picture_of: Picture) -> None:
    vlm = make_vlm("llava", 0)
    inputs = pair(vlm, picture_of)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(vlm.model, config).eval()
    with pytest.raises(BadInput, match=r"around a LlavaForConditionalGeneration: prune what its get_base_model\(\)"):
        ocvtp.prune(adapted, "random", 5)
    plain = adapted(**inputs).logits
    base = adapted.get_base_model()
    with ocvtp.prune(base, "random", 5) as handle:
        logits, answer = adapted(**inputs).logits, adapted.generate(**inputs, **NEW)
        assert [len(kept) for kept in handle.last_kept] == [5, 5]
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


@torch.no_grad()
def test_a_pipeline_of_transformers(make_vlm: Any, picture_of: Picture) -> None:
    from transformers import pipeline

    vlm = make_vlm("llava", 0)
    vlm.processor.chat_template = (
        "{% for message in messages %}<s>{% for part in message['content'] %}{% if part['type'] == 'image' %} <image>"
        "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    pipe = pipeline("image-text-to-text", model=vlm.model, processor=vlm.processor)
    picture = picture_of(0)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "is this"}]}]
    options = {"max_new_tokens": 4, "generate_kwargs": {"do_sample": False}, "return_full_text": False}
    with ocvtp.prune(vlm.model, "random", 3) as handle:
        (answer,) = pipe(text=chat, **options)
        assert len(handle.last_kept[0]) == 3
        inputs = vlm.processor(text=["<s> <image> is this"], images=[picture], return_tensors="pt")
        made = vlm.model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"].split() == vlm.processor.batch_decode(made)[0].split()


@pytest.mark.parametrize("part", ["language model", "tower", "all"])
@torch.no_grad()
def test_compiled_models(part: str, make_vlm: Any, picture_of: Picture) -> None:
    """By Dynamo, which is what pruning could get in the way of; what it makes of a graph is another matter."""
    plain, compiled = make_vlm("llava", 0), make_vlm("llava", 0)
    inputs, model = pair(plain, picture_of), compiled.model
    parts = {"language model": model.model.language_model, "tower": model.model.vision_tower, "all": model}
    parts[part].compile(backend="eager", dynamic=True)
    answers = []
    for each in (plain, compiled):
        with ocvtp.prune(each.model, "random", 5) as handle:
            answers.append((each.model.generate(**inputs, **NEW).tolist(), handle.last_kept))
    assert answers[0] == answers[1]
    if part == "language model":
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


def test_a_class_that_is_not_supported_names_those_that_are() -> None:
    class Other(torch.nn.Module):
        pass

    with pytest.raises(BadInput, match="is a Other, which cannot be pruned") as error:
        ocvtp.prune(Other(), "random", 5)
    assert all(name in str(error.value) for name in (*FAMILIES, "docs/your-own-vlm.md"))
