"""The cost of the loss `answers`, against what PyTorch counts and keeps of a frozen Llama."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ocvtp import cli
from ocvtp.efficiency.shapes import LlmShape, TowerShape, VlmShape, known_shape, parameters
from ocvtp.efficiency.teaching import teaching
from ocvtp.errors import BadInput

LLM = LlmShape(width=128, layers=4, mlp=352, queries=128, keys=64, vocabulary=81)
TOWER = TowerShape("clip", 96, 12, 11, 384, 8, 192, image_size=96)
ROWS, KEPT, TEXT = 6, 10, 22


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def frozen(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    config = LlamaConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=81, attn_implementation="sdpa")  # fmt: skip
    return LlamaForCausalLM(config).to(request.param).eval().requires_grad_(False)


def test_operations_and_memory_are_those_that_pytorch_counts(frozen: LlamaForCausalLM) -> None:
    embeds = torch.randn(ROWS, KEPT + TEXT, 128, dtype=frozen.dtype, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in frozen.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        states = frozen.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        frozen.lm_head(states[:, -1:]).sum().backward()
    found = teaching(VlmShape(TOWER, LLM, 96), image_tokens=144, kept=KEPT, images=ROWS // 2, prompts=2,
                     text_tokens=TEXT, bytes_per_number=frozen.dtype.itemsize)  # fmt: skip
    assert found.student == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert found.student_bytes == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.1)


def test_a_7b_model_by_hand() -> None:
    shape = known_shape("llava-1.5-7b")
    assert parameters(shape) == pytest.approx(7.06e9, rel=0.01)
    found = teaching(shape, image_tokens=576, kept=64, images=8, prompts=1, text_tokens=36)
    assert found.weights_bytes == pytest.approx(14.1e9, rel=0.01)
    assert found.student == pytest.approx(8 * 2 * 2 * 100 * 6.6e9, rel=0.05)
    assert found.teacher == pytest.approx(8 * (2 * 612 * 6.6e9 + 0.37e12), rel=0.08)
    assert found.student_bytes == 8 * 100 * 32 * (8 * 4096 + 2 * (4 * 4096 + 3 * 11008))
    assert found.held_bytes == 576 * 4096 * 2 + 32064 * 4
    sampled = teaching(shape, image_tokens=576, kept=64, images=8, prompts=1, text_tokens=36, samples=4)
    assert sampled.student == pytest.approx(2 * found.student, rel=0.01)  # four times forward against there and back
    assert (sampled.student_bytes, sampled.teacher) == (0, found.teacher)
    assert found.total == found.teacher + found.student + found.pruner
    with pytest.raises(BadInput, match="kept is 577 of 576"):
        teaching(shape, image_tokens=576, kept=577, images=1)
    with pytest.raises(BadInput, match="samples is -1"):
        teaching(shape, image_tokens=576, kept=64, images=1, samples=-1)
    with pytest.raises(BadInput, match="images is 0"):
        teaching(shape, image_tokens=576, kept=64, images=0)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flops", "--answers", "8", "--prompts", "1", "--keep", "64", "128", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    shape = known_shape("llava-1.5-7b")
    expected = teaching(shape, image_tokens=576, kept=64, images=8, prompts=1, samples=4).as_dict()
    assert rows[0] == {"tokens": 64, **expected}
    assert cli.main(["flops", "--answers", "8", "--keep", "64"]) == 0
    assert "loss=answers with llava-1.5-7b" in " ".join(capsys.readouterr().out.split())
