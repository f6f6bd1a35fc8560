"""Selection in half precision: what is multiplied in which type, and how many picks stay the same."""

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ocvtp.data.scenes import make_scene
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.vlms import load


def make(**options) -> OCPruner:
    torch.manual_seed(0)
    return OCPruner(PrunerConfig(**options)).eval()


class Products(TorchDispatchMode):
    """Notes in which types matrices are multiplied: by weights, and batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.batches = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::mkldnn_linear"):
            self.weights |= {each.dtype for each in args[:3] if isinstance(each, torch.Tensor)}
        elif name in ("aten::bmm", "aten::baddbmm"):
            self.batches |= {each.dtype for each in args[:2]}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "products"), [(None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_in_half_precision_slots_and_tokens_are_multiplied_in_float32(precision, products, masked):
    pruner = make(token_dim=32, grid=(6, 6))
    x = torch.randn(3, 36, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 36, dtype=torch.bool) if masked else None
    with Products() as seen:
        pruner.select(x, 7, mask=mask, precision=precision)
    assert seen.weights == {products}
    assert seen.batches == {torch.float32}


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.975), ("fp16", 0.99)])
def test_in_half_precision_nearly_all_picks_are_those_of_float32(precision, least):
    """Of the tokens of tiny-llava's tower, by weights that are not trained; docs/methods.md has trained ones."""
    vlm = load("tiny-llava", device="cpu")
    images = [Image.fromarray(make_scene(0, "benchmark", number).pixels_HW3) for number in range(64)]
    x = vlm.family.encode(vlm.preprocess(images, mode="pad"), {9}, values=False).tokens(9, range(64))
    wide = make(token_dim=96, grid=(12, 12))
    plain, half = (wide.select(x, 48, seeds=range(64), precision=each).tolist() for each in (None, precision))
    same = sum(len({*a} & {*b}) for a, b in zip(plain, half, strict=True)) / (64 * 48)
    assert least < same < 1
