"""What a tower made of a batch is made once, whatever is asked about it, and never taken for that of another batch."""

from collections.abc import Collection
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlms.families import family_of
from ocvtp.vlms.images import Images
from ocvtp.vlms.memory import VisionMemory


class Counting:
    """A family that counts passes of its tower."""

    def __init__(self, family: Any) -> None:
        self.family, self.passes = family, 0
        self.facts = family.facts

    def encode(self, images: Images, layers: Collection[int]) -> Any:
        self.passes += 1
        return self.family.encode(images, layers)


@pytest.fixture
def counting(llava: Any) -> Counting:
    return Counting(family_of(llava.model))


def batch(llava: Any, seed: int, images: int = 2) -> Images:
    side = llava.model.config.vision_config.image_size
    return Images(torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed)))


def test_a_batch_is_encoded_once_for_all_layers_that_were_asked_for(llava: Any, counting: Counting) -> None:
    memory, images = VisionMemory(), batch(llava, 0)
    with torch.no_grad():
        first = memory.encode(counting, images, {1})  # type: ignore[arg-type]
        assert memory.encode(counting, Images(images.pixels.clone()), {1}) is first  # type: ignore[arg-type]
        assert counting.passes == 1
        both = memory.encode(counting, images, {2})  # type: ignore[arg-type]
        assert memory.encode(counting, images, {1}) is both  # type: ignore[arg-type]
        assert counting.passes == 2
        other = batch(llava, 1)
        assert memory.encode(counting, other, {2}) is memory.encode(counting, other, {1})  # type: ignore[arg-type]
        assert counting.passes == 3
        plain = counting.family.encode(images, {1, 2})
    for layer in (1, 2):
        assert torch.equal(both.tokens(layer, [0, 1]), plain.tokens(layer, [0, 1]))
    assert torch.equal(both.values([0, 1]), plain.values([0, 1]))


def test_another_order_another_image_or_another_type_is_another_batch(llava: Any, counting: Counting) -> None:
    memory, images = VisionMemory(), batch(llava, 0)
    others = [Images(images.pixels.flip(0)), batch(llava, 1), Images(images.pixels[:1])]
    changed = images.pixels.clone()
    changed[-1, -1, -1, -1] += 1e-3
    with torch.no_grad():
        for one in (images, *others, Images(changed)):
            memory.encode(counting, one, {1})  # type: ignore[arg-type]
    assert counting.passes == 5


def test_it_forgets_what_was_used_longest_ago(llava: Any, counting: Counting) -> None:
    facts = counting.facts
    size = 2 * facts.tokens * facts.width * 4 * 2  # of two images, one layer and values
    memory, batches = VisionMemory(limit=2 * size), [batch(llava, seed) for seed in range(3)]
    with torch.no_grad():
        for number in (0, 1, 0, 2, 0):  # 2 pushes 1 out
            memory.encode(counting, batches[number], {1})  # type: ignore[arg-type]
        assert counting.passes == 3
        memory.encode(counting, batches[1], {1})  # type: ignore[arg-type]
    assert counting.passes == 4


def test_methods_that_share_a_memory_answer_as_without_it(llava: Any, picture_of: Any) -> None:
    memory = VisionMemory()
    inputs = llava.prompt([[picture_of(seed)] for seed in range(2)])
    for method, options in (("qr", {"layer": 2}), ("fps", {"layer": 3}), ("visionzip", {}), ("qr", {"layer": 2})):
        kept = []
        for shared in (False, True):
            with ocvtp.prune(llava.model, method, 6, **options) as handle:
                if shared:
                    handle.share(memory)
                answer = llava.model.generate(**inputs, max_new_tokens=4, do_sample=False)
                kept.append((handle.last_kept, answer.tolist()))
        assert kept[0] == kept[1]
