"""The least time that a phase can take on a device: what it must compute over the rate of matrix products, or what it
must read over the rate of copies, whichever is longer. Both rates are measured.

Counted are matrix products (`flops.prefill_flops`, with the attention pairs that a causal mask leaves) and the bytes of
weights and of cached keys and values, each read once; layers of the language model one by one, since a method inside it
leaves later ones fewer tokens. Activations, norms, softmax and the rows of attention that rank tokens inside the
language model are left out, so that no program can be faster.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ocvtp.efficiency.flops import MAC, by_layer, kv_cache_bytes, llm_layer_flops, prefill_flops
from ocvtp.efficiency.shapes import VlmShape, llm_parameters, projector_parameters, tower_parameters
from ocvtp.errors import BadInput
from ocvtp.phases import now

_SIZES = {"cpu": (2048, 1 << 28), "cuda": (8192, 1 << 32)}
"""Side of the matrices, and bytes of the copy."""
_RUNS = 7


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches.

    Attributes:
        flops: operations a second of a large matrix product, a multiply-accumulate being two.
        bandwidth: bytes a second of a large copy, those read and those written.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, device: str | torch.device, dtype: torch.dtype) -> "Ceilings":
        """Of a device with numbers of this type; some seconds on a CPU."""
        device = torch.device(device)
        side, size = _SIZES["cpu" if device.type == "cpu" else "cuda"]
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = _median(lambda: a @ b, device)
        source = torch.empty(size // 4, device=device, dtype=torch.int32)
        target = torch.empty_like(source)
        copied = _median(lambda: target.copy_(source), device)
        return cls(MAC * side**3 / product, 2 * size / copied)

    def seconds(self, flops: float, size: float) -> float:
        """The least time for so many operations and bytes."""
        return max(flops / self.flops, size / self.bandwidth)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def least(
    shape: VlmShape,
    ceilings: Ceilings,
    *,
    image_tokens: int,
    kept: int | Sequence[int] | None = None,
    text_tokens: int = 32,
    batch: int = 1,
    method: int = 0,
    tiles: int | None = None,
    inside_tower: int | None = None,
    bytes_per_number: int = 2,
) -> dict[str, float]:
    """The least milliseconds of each phase of `ocvtp.phases`, of a first token and of each later one.

    Args:
        shape: of the VLM.
        ceilings: of the device.
        image_tokens: of the unpruned image.
        kept: of them, what the language model reads: one count, or one for each of its layers for methods that drop
            tokens inside it (`ocvtp.methods.Entry.by_layer`); None is all.
        text_tokens: of a prompt beside the image's.
        batch: prompts of one image each.
        method: operations of the choice for one image.
        tiles: of an image.
        inside_tower: as `flops.prefill_flops` has it.
        bytes_per_number: of weights and cache.

    Raises:
        BadInput: counts that no image or batch has.
    """
    if batch < 1:
        raise BadInput(f"batch is {batch}: at least 1 is needed")
    llm = shape.llm
    read = by_layer(kept, image_tokens, llm.layers)
    work = prefill_flops(
        shape, image_tokens=image_tokens, kept=read, text_tokens=text_tokens, tiles=tiles, inside_tower=inside_tower,
        causal=True,
    )  # fmt: skip
    lengths = [tokens + text_tokens for tokens in read]
    layers, head = llm_parameters(llm), llm.width * llm.vocabulary
    cache = batch * kv_cache_bytes(llm, lengths, bytes_per_number=bytes_per_number)

    def ms(flops: float, numbers: float, more: float = 0) -> float:
        return 1000 * ceilings.seconds(batch * flops, bytes_per_number * numbers + more)

    one = llm.layers * llm_layer_flops(llm, 1) + 2 * MAC * sum(lengths) * llm.queries
    phases = {
        "tower": ms(work.tower, tower_parameters(shape.tower, shape.tower.used_layers)),
        "method": ms(method, 0),
        "projector": ms(work.projector, projector_parameters(shape)),
        "prefill": sum(ms(llm_layer_flops(llm, n, causal=True), layers / llm.layers) for n in lengths),
        "other": ms(work.lm_head, head),
    }
    return {**phases, "first_token": sum(phases.values()), "next_token": ms(one + work.lm_head, layers + head, cache)}


def distance(measured: dict[str, Any], limit: dict[str, float]) -> dict[str, float | None]:
    """Measured over least time by phase; None where nothing must be done.

    Args:
        measured: milliseconds by the keys of `least`.
        limit: from `least`.
    """
    return {
        name: None if value is None or not limit.get(name) else value / limit[name] for name, value in measured.items()
    }


def _median(run: Any, device: torch.device) -> float:
    """Seconds."""
    for _ in range(2):
        run()
    found = []
    for _ in range(_RUNS):
        start = now(device)
        run()
        found.append(now(device) - start)
    return statistics.median(found) or time.get_clock_info("perf_counter").resolution
