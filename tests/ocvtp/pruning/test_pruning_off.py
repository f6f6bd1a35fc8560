"""On and off: pruned models side by side, what `remove` gives back, and what is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp.errors import BadInput

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 6, "do_sample": False}


@torch.no_grad()
def test_two_pruned_models_and_a_plain_one_live_side_by_side(make_vlm: Callable[..., Any], picture_of: Picture) -> None:
    one, two, plain = (make_vlm("llava", seed) for seed in (1, 2, 1))
    inputs = one.prompt([[picture_of(0)], [picture_of(1)]])
    expected = plain.model.generate(**inputs, **NEW)
    weights = {name: value.clone() for name, value in one.model.state_dict().items()}
    with ocvtp.prune(one.model, "random", 5) as first:
        alone = one.model.generate(**inputs, **NEW)
        kept = first.last_kept
        with ocvtp.prune(two.model, "oc-vtp-untrained", 3, layer=2) as second:
            two.model.generate(**inputs, **NEW)
            assert torch.equal(one.model.generate(**inputs, **NEW), alone)
            assert (first.last_kept, [len(k) for k in second.last_kept]) == (kept, [3, 3])
            assert torch.equal(plain.model.generate(**inputs, **NEW), expected)
    assert not torch.equal(alone, expected)
    assert torch.equal(one.model.generate(**inputs, **NEW), expected)
    assert set(one.model.__dict__) == set(plain.model.__dict__)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_model_is_pruned_once_at_a_time(llava: Any, clean: None) -> None:
    handle = ocvtp.prune(llava.model, "random", 5)
    with pytest.raises(BadInput, match=r"pruned already: call remove\(\) on its handle first"):
        ocvtp.prune(llava.model, "random", 3)
    handle.remove()
    handle.remove()
    other = ocvtp.prune(llava.model, "random", 3)
    handle.remove()
    assert "_ocvtp_handle" in llava.model.__dict__
    other.remove()


def test_what_replaced_the_methods_before_comes_back(llava: Any, clean: None) -> None:
    def before(*args: Any, **kwargs: Any) -> Any:
        return type(llava.model).generate(llava.model, *args, **kwargs)

    llava.model.generate = before
    with ocvtp.prune(llava.model, "random", 5):
        assert llava.model.generate is not before
    assert llava.model.generate is before
    del llava.model.generate


@torch.no_grad()
def test_an_exception_inside_leaves_the_handle_usable(llava: Any, picture_of: Picture, clean: None) -> None:
    inputs = llava.prompt([[picture_of(0)]])

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop here")

    with ocvtp.prune(llava.model, "random", 5) as handle:
        expected = llava.model.generate(**inputs, **NEW)
        with pytest.raises(RuntimeError, match="stop here"):
            llava.model.generate(**inputs, **NEW, stopping_criteria=[fail])
        text = {"input_ids": torch.tensor([[1, 5, 6]])}
        llava.model(**text)
        assert handle.last_kept == []
        assert torch.equal(llava.model.generate(**inputs, **NEW), expected)


@torch.no_grad()
def test_vanilla_is_the_model_itself(llava: Any, batch: Any, clean: None) -> None:
    inputs = batch[1]
    logits, answer = llava.model(**inputs).logits, llava.model.generate(**inputs, **NEW)
    with ocvtp.prune(llava.model, "vanilla") as handle:
        assert torch.equal(llava.model(**inputs).logits, logits)
        assert torch.equal(llava.model.generate(**inputs, **NEW), answer)
        assert handle.last_kept == [list(range(16))] * 9


@torch.no_grad()
def test_prompts_without_images_are_left_alone(llava: Any, clean: None) -> None:
    inputs = llava.prompt([[], []])
    logits, answer = llava.model(**inputs).logits, llava.model.generate(**inputs, **NEW)
    with ocvtp.prune(llava.model, "random", 5) as handle:
        assert torch.equal(llava.model(**inputs).logits, logits)
        assert torch.equal(llava.model.generate(**inputs, **NEW), answer)
        assert handle.last_kept == []


@torch.no_grad()
def test_the_language_model_reads_the_kept_tokens_only(llava: Any, picture_of: Picture, clean: None) -> None:
    inputs = llava.prompt([[picture_of(0)], [picture_of(1)]])
    lengths: list[list[int]] = []
    hook = llava.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(list((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    with ocvtp.prune(llava.model, "random", 5):
        llava.model.generate(**inputs, **NEW)
    hook.remove()
    assert lengths[0] == [2, inputs["input_ids"].shape[1] - 11]
    assert lengths[1:] == [[2, 1]] * 5
