"""Vision towers: the hidden states of one pass, and attention of single blocks from their own norms, queries and keys.

A tower that sees tiles of equal size is described by the names of its parts and by whether a CLS row comes before its
patches (`PARTS`). It runs by its own forward, so that whatever lies in it, such as hooks that fetch offloaded weights,
does what it does for the model.

Letters: T images or tiles, L positions (CLS first, where there is one), N patches, C width, H heads, E width of a head.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput

_ROWS = 16
"""Images or tiles whose attention is in memory at the same time: 16 of 577 positions and 16 heads are 0.3 GB."""


@dataclass(frozen=True)
class Parts:
    """Names of what lies in a tower.

    Attributes:
        cls: a CLS row comes before the patches.
        blocks: the encoder blocks.
        norm: in a block, what comes before attention.
        attention: in a block; it has `q_proj`, `k_proj` and `head_dim`, and perhaps `q_norm` and `k_norm`.
    """

    cls: bool
    blocks: str = "encoder.layers"
    norm: str = "layer_norm1"
    attention: str = "self_attn"


PARTS: Mapping[str, Parts] = {
    "clip_vision_model": Parts(cls=True),
    "siglip_vision_model": Parts(cls=False),
    "internvl_vision": Parts(cls=True, blocks="encoder.layer", norm="layernorm_before", attention="attention"),
    "smolvlm_vision": Parts(cls=False),
}
"""By `model_type` of the tower's config."""


def parts_of(config: Any) -> Parts:
    """The parts of a VLM's tower, from the VLM's config; `BadInput` for an unknown one."""
    kind = config.vision_config.model_type
    if kind not in PARTS:
        raise BadInput(f"the vision tower is a {kind}: {', '.join(PARTS)} are supported (`ocvtp.vlms.tower.PARTS`)")
    return PARTS[kind]


class Tower:
    """One tower that sees tiles."""

    def __init__(self, module: Any) -> None:
        self.module, self._parts = module, PARTS[module.config.model_type]
        self.blocks = module.get_submodule(self._parts.blocks)
        self.first = int(self._parts.cls)
        """Rows before the patches."""

    def states(self, pixels_T3HW: Tensor, layers: Collection[int], ready: "Ready | None" = None) -> dict[int, Tensor]:
        """`hidden_states[layer]` with CLS, [T, L, C] each, as `transformers` has them; stops after the deepest."""
        pixels_T3HW = pixels_T3HW.to(device_of(self.module, pixels_T3HW.device))
        run = partial(self.module, pixel_values=pixels_T3HW)
        return recorded(self.blocks, layers, run, whole=False, ready=ready)[0]

    def onward(self, hidden_TLC: Tensor, layer: int, last: int) -> Tensor:
        """`hidden_states[last]`, [T, L, C], from (some rows of) `hidden_states[layer]`, which see each other alone."""
        for block in self.blocks[layer:last]:
            hidden_TLC = block(hidden_TLC, None)
        return hidden_TLC

    def queries(self, hidden_TLC: Tensor, block: int) -> Tensor:
        """Scaled queries of an encoder block, [T, H, L, E], from (some of) the hidden states that it reads."""
        q_THLE: Tensor = self._heads(hidden_TLC, block, "q") * self._attention(block).head_dim ** -0.5
        return q_THLE

    def _heads(self, hidden_TLC: Tensor, block: int, kind: str) -> Tensor:
        """Queries or keys of an encoder block, [T, H, L, E]."""
        attention = self._attention(block)
        made_TLC = getattr(attention, f"{kind}_proj")(getattr(self.blocks[block], self._parts.norm)(hidden_TLC))
        norm = getattr(attention, f"{kind}_norm", None)
        made_TLC = made_TLC if norm is None else norm(made_TLC)
        made_TLHE: Tensor = made_TLC.view(*made_TLC.shape[:2], -1, attention.head_dim)
        return made_TLHE.transpose(1, 2)

    def _attention(self, block: int) -> Any:
        return getattr(self.blocks[block], self._parts.attention)

    @torch.no_grad()
    def received(self, hidden_TLC: Tensor, block: int) -> Tensor:
        """Attention that each patch receives in a block, mean over heads and all queries (CLS too), [T, N] float32."""
        parts = []
        for some_TLC in hidden_TLC.split(_ROWS):
            q_THLE, k_THLE = self.queries(some_TLC, block), self._heads(some_TLC, block, "k")
            weights_THLL = (q_THLE.float() @ k_THLE.float().transpose(2, 3)).softmax(3)
            parts.append(weights_THLL.mean((1, 2))[:, self.first :])
        return torch.cat(parts)

    @torch.no_grad()
    def from_cls(self, hidden_TLC: Tensor, block: int) -> Tensor:
        """Attention that CLS pays to each patch in a block, mean over heads, [T, N] float32: one row of each head."""
        q_TH1E, k_THLE = self.queries(hidden_TLC[:, :1], block), self._heads(hidden_TLC, block, "k")
        weights_TH1L = (q_TH1E.float() @ k_THLE.float().transpose(2, 3)).softmax(3)
        return weights_TH1L.mean((1, 2))[:, self.first :]

    @torch.no_grad()
    def keys(self, hidden_TLC: Tensor, block: int) -> Tensor:
        """Keys of a block, mean over heads, without CLS, [T, N, E] float32."""
        return self._heads(hidden_TLC, block, "k").float().mean(1)[:, self.first :]


class _Deepest(Exception):
    """The deepest layer that was asked for is done."""


@dataclass(frozen=True)
class Ready:
    """Whom to give the hidden states of some layers before the tower goes on.

    Attributes:
        layer: the deepest of them, which a block reads.
        tell: is given what was kept so far.
    """

    layer: int
    tell: Callable[[dict[int, Tensor]], None]


def recorded(
    blocks: Any,
    layers: Collection[int],
    run: Callable[[], Any],
    *,
    whole: bool,
    note: Callable[[int, dict[str, Any]], None] | None = None,
    ready: Ready | None = None,
) -> tuple[dict[int, Tensor], Any]:
    """Run a tower and keep `hidden_states` of some layers: 0 is what the first block reads, n what the nth makes.

    Args:
        blocks: of the tower, in their order.
        layers: which to keep.
        run: has the tower run.
        whole: do not stop after the deepest of them.
        note: is told the number of each block, and by name what it reads beside hidden states.
        ready: is told before a block runs.

    Returns:
        The hidden states by layer, and what `run` returned; None if it was stopped.
    """
    states, mine = dict[int, Tensor](), threading.get_ident()
    deepest = -1 if whole else max(layers)

    def keep(layer: int, hidden: Any) -> None:
        if threading.get_ident() != mine:
            return
        if layer in layers:
            states[layer] = hidden[0] if isinstance(hidden, tuple) else hidden
        if layer == deepest:
            raise _Deepest

    def before(number: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != mine:
            return
        if note is not None:
            note(number, kwargs)
        if number == 0:
            keep(0, args[0] if args else kwargs["hidden_states"])
        if ready is not None and number == ready.layer:
            ready.tell(states)

    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(partial(before, number), with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _, __, output, done=number + 1: keep(done, output)))
    try:
        return states, run()
    except _Deepest:
        return states, None
    finally:
        for hook in hooks:
            hook.remove()


def device_of(module: Any, otherwise: torch.device) -> torch.device:
    """Where a module computes; offloaded weights lie on `meta` until their hooks fetch them to that device."""
    found: torch.device = next((held.device for held in module.parameters()), otherwise)
    if found.type != "meta":
        return found
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), otherwise)
    return torch.device(device)


@contextmanager
def fetched(module: Any) -> Iterator[None]:
    """Within, the parameters that lie directly in a module are there, also where they are offloaded."""
    if all(weight.device.type != "meta" for weight in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device  # whoever offloads has it

    with align_module_device(module):
        yield


def weight_of(module: Any, name: str) -> Tensor:
    """A parameter that lies directly in a module, also where it is offloaded."""
    weight: Tensor = getattr(module, name)
    if weight.device.type != "meta":
        return weight
    with fetched(module):
        weight = getattr(module, name)
        return weight.clone()
