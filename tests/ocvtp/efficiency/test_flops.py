"""Closed forms against the paper's Table 4 and against torch's own counter on small random models."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import ocvtp
from ocvtp.efficiency.flops import (
    kv_cache_bytes,
    llm_layer_flops,
    paper_llm_flops,
    prefill_flops,
    pruner_flops,
    ranking_flops,
)
from ocvtp.efficiency.shapes import KNOWN, known_shape, shape_of
from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods import REGISTRY
from ocvtp.vlms import family_of


def counted_attention() -> AbstractContextManager[None]:
    """Attention as plain matrix products: torch 2.11 does not count a CPU's own kernel."""
    return sdpa_kernel(SDPBackend.MATH)


@pytest.mark.parametrize(
    ("vision", "printed"),
    [(64, "0.97"), (2880, "33.76"), (160, "1.95")],
)
def test_table_4_of_the_paper(vision: int, printed: str) -> None:
    assert f"{paper_llm_flops(vision + 32) / 1e12:.2f}" == printed


def test_the_cell_of_table_4_that_the_formula_misses_by_one_token() -> None:
    assert f"{paper_llm_flops(576 + 32) / 1e12:.2f}" == "6.31"
    assert f"{paper_llm_flops(576 + 31) / 1e12:.2f}" == "6.30"


@pytest.mark.parametrize(("tokens", "macs_g", "printed"), [(576, "2.982", "5.97"), (2880, "11.891", "23.82")])
def test_the_pruner_of_table_4(tokens: int, macs_g: str, printed: str) -> None:
    assert f"{pruner_flops(tokens, 1024, 64) / 2e9:.3f}" == macs_g
    assert f"{pruner_flops(tokens, 1024, 64, elementwise=True) / 1e9:.2f}" == printed


def test_true_prefill_of_llava_1_5() -> None:
    shape = known_shape("llava-1.5-7b")
    vanilla = prefill_flops(shape, image_tokens=576)
    pruned = prefill_flops(shape, image_tokens=576, kept=64, pruner=pruner_flops(576, 1024, 65))
    # sums written out: 32 layers of 4 d^2 + 3 d m a token and 2 n d a pair of tokens
    n, d, m = 608, 4096, 11008
    assert vanilla.llm == 2 * 32 * (n * (4 * d * d + 3 * d * m) + 2 * n * n * d)
    assert round(vanilla.total / 1e12, 2) == 8.46
    assert round(pruned.total / 1e12, 2) == 1.62
    assert pruned.tower == vanilla.tower
    assert pruned.projector * 576 == vanilla.projector * 64
    assert kv_cache_bytes(shape.llm, 608) == 318_767_104


def test_true_prefill_of_llava_next() -> None:
    shape = known_shape("llava-next-7b")
    vanilla = prefill_flops(shape, image_tokens=2880)
    pruned = prefill_flops(shape, image_tokens=2880, kept=160, pruner=pruner_flops(2880, 1024, 161))
    assert vanilla.tower == 5 * prefill_flops(shape, image_tokens=576).tower
    assert round(vanilla.total / 1e12, 1) == 44.1
    assert round(pruned.total / 1e12, 2) == 4.37
    assert round(pruned.pruner / 1e9, 1) == 27.8


def test_known_shapes_are_those_of_the_configs() -> None:
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
    )
    assert shape_of(LlavaConfig(vision_config=vision, text_config=text)) == KNOWN["llava-1.5-7b"]
    assert shape_of(LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=9)).tower.used_layers == 9


def _tiny_llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=5, num_attention_heads=3, image_size=64,
        patch_size=8, projection_dim=48,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=64, intermediate_size=144, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=96, image_seq_length=64)
    return LlavaForConditionalGeneration(config).eval()


def test_llava_equals_torchs_counter() -> None:
    torch.manual_seed(0)
    model = _tiny_llava()
    ids = torch.randint(3, 90, (1, 64 + 11))
    ids[:, 4:68] = 96
    with FlopCounterMode(display=False) as counter, counted_attention(), torch.inference_mode():
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 64, 64), logits_to_keep=1)
    counted = counter.get_total_flops()
    by_part = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    runs_all = by_part["LlavaForConditionalGeneration.model.vision_tower"]
    for layers in (4, 5):  # transformers may or may not stop after the layer that is used
        want = prefill_flops(shape_of(model.config), image_tokens=64, text_tokens=11, tower_layers=layers)
        if abs(want.tower / runs_all - 1) < 0.01:
            break
    assert want.tower == pytest.approx(runs_all, rel=0.01)
    assert want.total == pytest.approx(counted, rel=0.01)
    assert want.projector == by_part["LlavaForConditionalGeneration.model.multi_modal_projector"]
    assert want.llm == pytest.approx(by_part["LlavaForConditionalGeneration.model.language_model"], rel=0.01)


@torch.inference_mode()
def test_pruned_inside_the_tower_equals_torchs_counter() -> None:
    """What it saves; choosing costs as much as after the tower."""
    torch.manual_seed(0)
    model, keep, layer = _tiny_llava(), 9, 2
    ids = torch.randint(3, 90, (1, 64 + 11))
    ids[:, 4:68] = 96
    pixels, counted = torch.randn(1, 3, 64, 64), []
    for inside_tower in (False, True):
        with (
            ocvtp.prune(model, "css", keep, layer=layer, inside_tower=inside_tower),
            FlopCounterMode(display=False) as counter,
            counted_attention(),
        ):
            model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
        counted.append(counter.get_total_flops())
    shape = shape_of(model.config)
    after, inside = (prefill_flops(shape, image_tokens=64, kept=keep, inside_tower=each) for each in (None, layer))
    assert after.total - inside.total == counted[0] - counted[1] == after.tower - inside.tower
    whole = prefill_flops(shape, image_tokens=64, inside_tower=layer)
    assert whole == prefill_flops(shape, image_tokens=64), "with all tokens nothing is saved"


def test_pruned_inside_the_tower_of_real_vlms() -> None:
    one = prefill_flops(known_shape("llava-1.5-7b"), image_tokens=576, kept=64, inside_tower=9)
    # By hand: 9 of 23 blocks with 577 rows, 14 with 65, each of 12 d^2 a row and 2 d a pair of rows.
    blocks = sum(layers * (12 * n * 1024**2 + 2 * n**2 * 1024) for layers, n in ((9, 577), (14, 65)))
    assert one.tower == 2 * (576 * 3 * 14**2 * 1024 + blocks)
    tiles = prefill_flops(known_shape("llava-next-7b"), image_tokens=2880, kept=5 * 64, inside_tower=9)
    assert tiles.tower == 5 * one.tower
    few = prefill_flops(known_shape("llava-next-7b"), image_tokens=2880, kept=3, inside_tower=9)
    assert few.tower - 5 * (
        prefill_flops(known_shape("llava-1.5-7b"), image_tokens=576, tower_layers=9).tower
    ) == 2 * 14 * 3 * (12 * 2 * 1024**2 + 2 * 2**2 * 1024), "two of five tiles do not go on"
    with pytest.raises(BadInput, match="inside_tower is 24: 23 layers of the tower run"):
        prefill_flops(known_shape("llava-1.5-7b"), image_tokens=576, kept=64, inside_tower=24)
    with pytest.raises(BadInput, match="inside_tower needs a tower whose patches are the tokens"):
        prefill_flops(known_shape("qwen2.5-vl-7b"), image_tokens=999, kept=111, inside_tower=9)


def test_qwen_equals_torchs_counter() -> None:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 2, "out_hidden_size": 48,
            "window_size": 56, "fullatt_block_indexes": [1], "patch_size": 14, "spatial_merge_size": 2,
        },
        text_config={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 120,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        },
        image_token_id=110, video_token_id=111, vision_start_token_id=112, vision_end_token_id=113,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    grid = (5, 6)
    ids = torch.randint(3, 100, (1, 30 + 9))
    ids[:, 5] = 112
    ids[:, 6:36] = 110
    with FlopCounterMode(display=False) as counter, counted_attention(), torch.inference_mode():
        model(
            input_ids=ids,
            pixel_values=torch.randn(120, 3 * 2 * 14**2),
            image_grid_thw=torch.tensor([[1, 10, 12]]),
            mm_token_type_ids=(ids == 110).int(),
            logits_to_keep=1,
        )
    want = prefill_flops(shape_of(model.config), image_tokens=30, text_tokens=9, grid=grid)
    by_part = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    tower = by_part["Qwen2_5_VLForConditionalGeneration.model.visual"]
    assert want.tower + want.projector == pytest.approx(tower, rel=0.01)
    assert want.total == pytest.approx(counter.get_total_flops(), rel=0.01)
    whole_windows = prefill_flops(shape_of(model.config), image_tokens=30, text_tokens=9)
    assert whole_windows.tower != want.tower  # 5 x 6 has ragged windows of 2 x 2


def test_tokens_dropped_inside_the_language_model() -> None:
    shape = shape_of(_tiny_llava().config)
    d, m, queries, keys = 64, 144, 64, 32
    counts = [64, 32, 8]
    layers = sum(2 * (n * d * (2 * queries + 2 * keys + 3 * m) + 2 * n * n * queries) for n in (96, 64, 40))
    # Before each layer that reads less: keys of all that is there, one query, and one row of products.
    ranking = sum(2 * (n * d * keys + d * queries + n * queries) for n in (96, 64))
    got = prefill_flops(shape, image_tokens=64, kept=counts)
    assert got.llm == layers + ranking
    assert got.projector == prefill_flops(shape, image_tokens=64).projector
    assert prefill_flops(shape, image_tokens=64, kept=[32] * 3) == prefill_flops(shape, image_tokens=64, kept=32)
    # 33 rows where text asks, and once 64 tokens against 32 words.
    more = sum(2 * 32 * (d * queries + n * queries) for n in (96, 64)) + 2 * 64 * 32 * d
    assert prefill_flops(shape, image_tokens=64, kept=counts, text_asks=True).llm == got.llm + more
    assert ranking_flops(shape.llm, 96) + ranking_flops(shape.llm, 64) == ranking
    assert kv_cache_bytes(shape.llm, [96, 64, 40]) == 2 * keys * 200 * 2
    paper = sum(2 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m) for n in (96, 64, 40))
    assert paper_llm_flops([96, 64, 40], width=d, layers=3, mlp=m) == paper


@pytest.mark.parametrize(("method", "keep"), [("fastv", 26), ("pyramiddrop", 30), ("sparsevlm", 40)])
def test_methods_inside_the_language_model_equal_torchs_counter(method: str, keep: int) -> None:
    torch.manual_seed(0)
    model, entry, text = _tiny_llava(), REGISTRY[method], 11
    ids = torch.randint(3, 90, (1, 64 + text))
    ids[:, :64] = 96
    assert entry.per_layer is not None
    counts = entry.per_layer(64, keep, 3, entry.options)
    with (
        ocvtp.prune(model, method, keep) as handle,
        FlopCounterMode(display=False) as counter,
        counted_attention(),
        torch.inference_mode(),
    ):
        output = model(input_ids=ids, pixel_values=torch.randn(1, 3, 64, 64), logits_to_keep=1, use_cache=True)
    assert handle.last_layers == [[count] for count in counts]
    want = prefill_flops(
        shape_of(model.config), image_tokens=64, kept=counts, text_tokens=text, text_asks=entry.text_asks
    )
    by_part = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert want.llm == pytest.approx(by_part["LlavaForConditionalGeneration.model.language_model"], rel=0.01)
    assert want.total == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert want.llm < 0.75 * prefill_flops(shape_of(model.config), image_tokens=64, text_tokens=text).llm
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    shape = shape_of(model.config).llm
    assert held == kv_cache_bytes(shape, [count + text for count in counts], bytes_per_number=4)


def test_causal_attention_counts_half_the_pairs() -> None:
    llm = known_shape("llava-1.5-7b").llm
    pairs = sum(1 for i in range(20) for j in range(20) if j <= i)
    assert llm_layer_flops(llm, 20) - llm_layer_flops(llm, 20, causal=True) == 2 * 2 * (400 - pairs) * 4096


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kept": 65}, "keeps 0 to 64"),
        ({"kept": [64, 64]}, "3 layers"),
        ({"kept": -1}, "-1"),
        ({"text_tokens": -1}, "text_tokens"),
        ({"tower_layers": 6}, "5 layers"),
    ],
)
def test_impossible_counts_are_named(arguments: dict, named: str) -> None:
    shape = shape_of(_tiny_llava().config)
    with pytest.raises(BadInput, match=named):
        prefill_flops(shape, image_tokens=64, **arguments)


def test_a_grid_that_is_not_the_image_is_refused() -> None:
    with pytest.raises(BadInput, match="grid 5 x 6 has 30 tokens"):
        prefill_flops(known_shape("qwen2.5-vl-7b"), image_tokens=31, grid=(5, 6))


def test_unknown_models_are_refused() -> None:
    with pytest.raises(Incompatible, match="llama"):
        shape_of(LlamaConfig())
    with pytest.raises(BadInput, match=r"llava-1\.5-7b"):
        known_shape("llava")


@pytest.mark.parametrize(
    "family",
    ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "tiny_qwen", "internvl", "llava_onevision", "gemma3", "smolvlm"],
)
def test_each_family_equals_torchs_counter(family: str, make_vlm: Callable[..., Any], picture_of: Any) -> None:
    """Tower, what lies between, language model, and all together."""
    vlm = make_vlm(family)
    inputs = vlm.prompt([[picture_of(0, 150, 70)]])
    adapter = family_of(vlm.model)
    images = adapter.images(inputs)
    (tokens,), (grid,) = adapter.counts(images), adapter.grids(images)
    with FlopCounterMode(display=False) as counter, counted_attention(), torch.inference_mode():
        vlm.model(**inputs, logits_to_keep=1)
    more: dict[str, Any] = {"grid": grid}
    if hasattr(adapter, "shapes"):
        more = {"tiles": adapter.shapes(images)[0].tiles}
    shape = shape_of(vlm.model.config)
    if family in ("llava", "llava_next"):  # unpruned, transformers runs the last block too, and projects padding
        patches = more["tiles"] * shape.tower.patches_per_tile
        more |= {"tower_layers": shape.tower.layers, "projected": patches}
    text = inputs["input_ids"].shape[1] - tokens
    want = prefill_flops(shape, image_tokens=tokens, text_tokens=text, **more)
    names = {id(module): name for name, module in vlm.model.named_modules()}
    by_part = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    between = sum(by_part[names[id(module)]] for module in adapter.projectors)
    tower = by_part[names[id(adapter.tower)]]
    if names[id(adapter.projectors[0])].startswith(names[id(adapter.tower)]):  # Qwen's mergers lie in the tower
        tower -= between
    assert want.projector == between
    assert want.tower == pytest.approx(tower, rel=0.01)
    assert want.llm == pytest.approx(by_part[names[id(vlm.model.get_decoder())]], rel=0.01)
    assert want.total == pytest.approx(counter.get_total_flops(), rel=0.01)
