"""Models with weights in 8 bits, by the packages that people use: pruned as others are.

Not in 4 bits: bitsandbytes packs them in blocks of 64, and the widths of tiny VLMs are no multiples of that.

The packages are no dependencies: without them these tests are skipped, and `test_quantised_models_are_pruned_as_others`
(a linear layer without `weight`) has to do.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import ocvtp
from ocvtp.vlms import load

NEW = {"max_new_tokens": 4, "do_sample": False}


def bitsandbytes() -> Any:
    """Its config."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao() -> Any:
    """Its config."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    from transformers import TorchAoConfig

    return TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig())


CONFIGS: dict[str, Callable[[], Any]] = {
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen"])
@torch.no_grad()
def test_a_quantised_model_is_pruned_as_others(name: str, config: str, picture_of: Callable[..., Any]) -> None:
    vlm = load(name)
    small = AutoModelForImageTextToText.from_pretrained(
        vlm.entry.folder, quantization_config=CONFIGS[config](), dtype=torch.float32
    ).eval()
    layer = small.model.language_model.layers[0].mlp.up_proj
    assert type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter, "nothing was quantised"
    content = [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = vlm.processor(text=text, images=picture_of(0, 96, 96), return_tensors="pt")
    whole = small.generate(**inputs, **NEW)
    for method in ("css", "random"):
        with ocvtp.prune(small, method, 1.0):
            assert torch.equal(small.generate(**inputs, **NEW), whole)
        with ocvtp.prune(small, method, 8) as handle:
            small.generate(**inputs, **NEW)
            assert [len(kept) for kept in handle.last_kept] == [8]
    assert torch.equal(small.generate(**inputs, **NEW), whole)
