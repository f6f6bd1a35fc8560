"""The least time of each phase, random VLMs that have the shapes of real ones, and the phases of a call."""

import pytest
import torch

import ocvtp
from ocvtp.efficiency.flops import prefill_flops
from ocvtp.efficiency.latency import timed
from ocvtp.efficiency.random_vlm import config_of, random_inputs
from ocvtp.efficiency.roofline import Ceilings, distance, least
from ocvtp.efficiency.shapes import KNOWN, known_shape, parameters, shape_of
from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY
from ocvtp.phases import PHASES, phase

CEILINGS = Ceilings(flops=790e12, bandwidth=4.3e12)
"""Of an H200, as measured."""


def test_llava_on_an_h200() -> None:
    """By hand: 6.476 G parameters in the layers and 0.131 G in the head, 2 bytes each; 608 tokens are compute-bound."""
    shape = known_shape("llava-1.5-7b")
    whole = least(shape, CEILINGS, image_tokens=576)
    few = least(shape, CEILINGS, image_tokens=576, kept=64)
    work = prefill_flops(shape, image_tokens=576, causal=True)
    assert whole["prefill"] == pytest.approx(1000 * work.llm / 790e12)
    assert few["prefill"] == pytest.approx(1000 * 2 * 6.476e9 / 4.3e12, rel=1e-3)
    assert few["next_token"] == pytest.approx(1000 * 2 * (6.476e9 + 0.131e9 + 96 * 2 * 4096 * 32) / 4.3e12, rel=1e-3)
    assert whole["first_token"] == pytest.approx(sum(whole[name] for name in PHASES))
    assert whole["tower"] == few["tower"]
    assert whole["method"] == 0


def test_a_method_inside_the_llm_leaves_later_layers_fewer_tokens() -> None:
    """FastV on LLaVA-1.5-7B, 128 of 576 on average: two layers read all of them, and thirty 98."""
    shape = known_shape("llava-1.5-7b")
    read = REGISTRY["fastv"].by_layer(576, 128, 32, {})
    assert read == [576] * 2 + [98] * 30
    found, whole, last, mean = (least(shape, CEILINGS, image_tokens=576, kept=k) for k in (read, 576, 98, 128))
    # 608 tokens are compute-bound, 130 wait for the weights, and so do 160.
    assert found["prefill"] == pytest.approx((2 * whole["prefill"] + 30 * last["prefill"]) / 32)
    assert mean["prefill"] < found["prefill"] < whole["prefill"]
    assert found["projector"] == whole["projector"], "all tokens enter the language model"
    cached = 2 * (6.476e9 + 0.131e9) + 2 * 2 * 4096 * (2 * 608 + 30 * 130)
    assert found["next_token"] == pytest.approx(1000 * cached / 4.3e12, rel=1e-3)
    with pytest.raises(BadInput, match="kept has 3 counts: one for each of the 32 layers"):
        least(shape, CEILINGS, image_tokens=576, kept=[576, 64, 64])


def test_a_batch_reads_weights_once() -> None:
    shape = known_shape("llava-1.5-7b")
    one, eight = (least(shape, CEILINGS, image_tokens=576, kept=64, batch=batch) for batch in (1, 8))
    assert eight["tower"] == pytest.approx(8 * one["tower"])
    assert one["next_token"] < eight["next_token"] < 1.1 * one["next_token"]
    with pytest.raises(BadInput, match="batch is 0"):
        least(shape, CEILINGS, image_tokens=576, batch=0)


def test_layers_of_the_tower_that_never_run_are_not_read() -> None:
    """23 of CLIP's 24: 12 matrices of 1024 x 1024 each, in 2 bytes, where reading is all that takes time."""
    slow = Ceilings(flops=1e30, bandwidth=1e9)
    found = least(known_shape("llava-1.5-7b"), slow, image_tokens=576)
    assert found["tower"] == pytest.approx(1000 * 2 * 23 * 12 * 1024**2 / 1e9)


def test_distance() -> None:
    assert distance({"tower": 3.0, "method": 1.0, "next_token": None}, {"tower": 2.0, "method": 0.0}) == {
        "tower": 1.5, "method": None, "next_token": None}  # fmt: skip


def test_ceilings_are_what_this_machine_does() -> None:
    found = Ceilings.measured("cpu", torch.float32)
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert found.seconds(found.flops, 0) == pytest.approx(1)
    assert found.seconds(0, 2 * found.bandwidth) == pytest.approx(2)


@pytest.mark.parametrize("name", KNOWN)
def test_a_random_vlm_has_the_shape_that_is_counted(name: str) -> None:
    config = config_of(name)
    assert shape_of(config) == KNOWN[name]
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    assert matrices == pytest.approx(parameters(KNOWN[name]), rel=0.01)


def test_the_vlm_is_known_by_name() -> None:
    with pytest.raises(BadInput, match="'gpt' is neither a VLM of the catalogue"):
        config_of("gpt")


def hooks(model) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3", "smolvlm"]
)
def test_phases_are_all_of_a_call(family: str, make_vlm, picture_of) -> None:
    vlm = make_vlm(family)
    inputs = vlm.prompt([[picture_of(0, 84, 84)]])
    for method in ("vanilla", "css"):
        with ocvtp.prune(vlm.model, method, 2):
            vlm.model.generate(**inputs, do_sample=False, max_new_tokens=1)
    before = hooks(vlm.model)  # transformers leaves some of its own at the first call
    for method in ("vanilla", "css"):
        with ocvtp.prune(vlm.model, method, 2), timed(vlm.model, torch.device("cpu")) as seconds:
            vlm.model.generate(**inputs, do_sample=False, max_new_tokens=1, min_new_tokens=1)
        assert set(seconds) == set(PHASES)
        assert all(seconds[name] > 0 for name in ("tower", "projector", "prefill", "other"))
        assert (seconds["method"] > 0) == (method == "css")
    assert hooks(vlm.model) == before


@pytest.mark.parametrize(
    "family",
    ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm"],
)
def test_random_inputs_are_what_a_model_takes(family: str, make_vlm) -> None:
    vlm = make_vlm(family)
    inputs = random_inputs(vlm.model, 2, text_tokens=6, pixels=(112, 56))
    with ocvtp.prune(vlm.model, "random", 2) as handle:
        made = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=2, min_new_tokens=2)
    assert len(made) == 2
    assert [len(kept) for kept in handle.last_kept] == [2, 2]
    with pytest.raises(BadInput, match="text_tokens is 1"):
        random_inputs(vlm.model, text_tokens=1)


def test_nobody_listens() -> None:
    with phase("method"):
        pass
