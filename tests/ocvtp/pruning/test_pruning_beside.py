"""Choosing as soon as the layer is there, beside the rest of the tower: the same tokens, and who waits for whom."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp import streams
from ocvtp.errors import BadInput
from ocvtp.methods import REGISTRY
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.vlms import family_of

Picture = Callable[..., Image.Image]
EARLY = {"css": {"layer": 2}, "qr": {"layer": 2}, "fps": {"layer": 2}, "medoids": {"layer": 2}, "hiprune": {},
         "oc-vtp-untrained": {"layer": 2}, "oc-vtp": {"layer": 2}}  # fmt: skip
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3", "smolvlm")


@pytest.fixture
def inputs(vlm: Any, picture_of: Picture) -> Any:
    """Ragged prompts, one without an image."""
    sizes = [[(112, 112)], [(140, 84), (112, 112)], [], [(84, 168)]]
    return vlm.prompt(
        [[picture_of(5 * row + i, *size) for i, size in enumerate(each)] for row, each in enumerate(sizes)]
    )


def options(vlm: Any, method: str) -> dict[str, Any]:
    if method != "oc-vtp":
        return EARLY[method]
    torch.manual_seed(0)
    return {**EARLY[method], "pruner": OCPruner(PrunerConfig(family_of(vlm.model).facts.width, grid=(4, 4))).eval()}


@torch.no_grad()
def kept_and_order(vlm: Any, inputs: Any, method: str, **given: Any) -> tuple[list[list[int]], list[str], torch.Tensor]:
    """Of a pruned call: what stays, whether the choice or the tower's last block came first, and logits."""
    order: list[str] = []
    with ocvtp.prune(vlm.model, method, 0.5, **given) as handle:
        chooser, blocks = handle._method, family_of(vlm.model).tower
        blocks = blocks.blocks if hasattr(blocks, "blocks") else family_of(vlm.model).eye.blocks
        last = blocks[family_of(vlm.model).facts.feature_layer - 1]
        hook = last.register_forward_hook(lambda *_: order.append("tower"))
        choose = chooser.choose
        with mock.patch.object(chooser, "choose", lambda encoded: order.append("choice") or choose(encoded)):
            logits = vlm.model(**inputs).logits
        hook.remove()
        return handle.last_kept, list(dict.fromkeys(order)), logits


@pytest.mark.parametrize("vlm", FAMILIES, indirect=True)
@pytest.mark.parametrize("method", EARLY)
def test_the_same_tokens_are_chosen_before_the_tower_is_done(
    vlm: Any, inputs: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(vlm, method)
    plain, order, logits = kept_and_order(vlm, inputs, method, **given)
    assert order == ["tower", "choice"]
    monkeypatch.setenv(streams.SWITCH, "1")
    early, order, others = kept_and_order(vlm, inputs, method, **given)
    assert order == ["choice", "tower"]
    assert early == plain
    assert torch.equal(others, logits)


@pytest.mark.parametrize("vlm", ["llava", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(
    ("method", "option", "more"),
    [("random", None, {}), ("visionzip", None, {}), ("holov", None, {}), ("qr", "layer", {}),
     ("css", "spread_layer", {"layer": 2, "spread": 1})],
)  # fmt: skip
def test_who_reads_what_the_llm_is_fed_from_waits_for_it(
    vlm: Any, inputs: Any, method: str, option: str | None, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = more if option is None else {**more, option: family_of(vlm.model).facts.feature_layer}
    monkeypatch.setenv(streams.SWITCH, "1")
    assert kept_and_order(vlm, inputs, method, **given)[1] == ["tower", "choice"]


def test_inside_the_tower_nothing_is_left_to_run_beside(
    llava: Any, picture_of: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, given = llava.prompt([[picture_of(0)]]), {"layer": 2, "inside_tower": True}
    plain = kept_and_order(llava, inputs, "fps", **given)
    monkeypatch.setenv(streams.SWITCH, "1")
    again = kept_and_order(llava, inputs, "fps", **given)
    assert again[:2] == plain[:2]
    assert torch.equal(again[2], plain[2])


def test_every_method_that_says_it_reads_no_more_is_compared_above(llava: Any) -> None:
    found = set()
    for name, entry in REGISTRY.items():
        if entry.acts == "before the LLM" and name not in ("trim", "cdpruner"):  # which need a text tower
            with ocvtp.prune(llava.model, name, 0.5, **(options(llava, name) if name in EARLY else {})) as handle:
                found |= {name} if handle._method.by_states else set()
    assert found == set(EARLY)


def test_other_settings_of_the_switch_are_refused(
    llava: Any, picture_of: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(streams.SWITCH, "yes")
    with pytest.raises(BadInput, match="OCVTP_SIDE_STREAM is 'yes': 1 turns"), ocvtp.prune(llava.model, "random", 4):
        llava.model(**llava.prompt([[picture_of(0)]]))


def test_on_cuda_each_stream_waits_for_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            said.append(f"{self.name} begins")

        def __exit__(self, *_: object) -> None:
            said.append(f"{self.name} ends")

    current, made = Stream("current"), mock.Mock()
    made.record_stream = lambda stream: said.append(f"held for {stream.name}")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    streams._side.cache_clear()
    beside = streams.Beside(torch.device("cuda", 0))
    assert streams.Beside(torch.device("cuda", 0))._side is beside._side
    with beside.running():
        said.append("choice")
    said.append("tower")
    beside.join(made, None)
    streams._side.cache_clear()
    assert said == ["side waits for current", "side begins", "choice", "side ends", "tower", "current waits for side",
                    "held for current"]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: there is no second stream elsewhere")
@torch.no_grad()
def test_on_a_gpu_the_same_tokens_are_chosen(
    make_vlm: Callable[..., Any], picture_of: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = make_vlm("llava")
    vlm.model.cuda()
    inputs = vlm.prompt([[picture_of(0)], [picture_of(1)]]).to("cuda")
    for method in EARLY:
        monkeypatch.delenv(streams.SWITCH, raising=False)
        plain = kept_and_order(vlm, inputs, method, **options(vlm, method))[0]
        monkeypatch.setenv(streams.SWITCH, "1")
        for _ in range(3):  # the third is replayed
            assert kept_and_order(vlm, inputs, method, **options(vlm, method))[0] == plain
