"""A few rows of one layer's attention, from its own norm, queries, keys and rotary positions.

The model goes on with whatever attention it has (SDPA, flash, eager): nothing but these rows is computed twice.

Letters: B prompts, S columns, P columns in the cache before them, I images, R rows of attention (queries) of an image,
H heads, K heads of keys, E width of a head, D width of the LLM.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocvtp.errors import Incompatible
from ocvtp.methods.inside import HeadRows

_NUMBERS = 1 << 26
"""Of keys and attention in memory at the same time: 256 MiB."""


class Rows(NamedTuple):
    """Which rows: of each image, the prompt it stands in and the columns that ask, some of them filled up."""

    prompts_I: Tensor
    columns_IR: Tensor
    real_IR: Tensor


class Read(NamedTuple):
    """What a layer is about to read."""

    states_BSD: Tensor
    rotation: tuple[Tensor, Tensor]
    """Cosines and sines of the positions, [B or 1, S, E]."""
    mask_BS: Tensor
    """Of the columns; and of those in the cache, before them: [B, P + S]."""
    past_BKPE: Tensor | None
    """Keys in the cache."""


def readable(layer: Any, method: str) -> None:
    """`Incompatible` unless a layer has the parts that `attended` takes."""
    attention = getattr(layer, "self_attn", None)
    parts = {"input_layernorm": layer, **dict.fromkeys(("q_proj", "k_proj", "head_dim", "scaling"), attention)}
    missing = [name for name, owner in parts.items() if not hasattr(owner, name)]
    if attention is not None and _rotary(attention) is None:
        missing.append("apply_rotary_pos_emb")
    if missing:
        raise Incompatible(
            f"{method} reads queries and keys of the language model's layers, but {type(layer).__name__} has no "
            f"{', '.join(missing)}: Llama, Mistral and Qwen2 have them; or choose a method before the LLM"
        )


@torch.no_grad()
def attended(
    layer: Any,
    read: Read,
    rows: Rows,
    vision_IS: Tensor | None = None,
    weigh: Callable[[HeadRows], Tensor] | None = None,
) -> Tensor:
    """Attention that the rows of each image pay to every column, [I, S] float32.

    Args:
        layer: of the language model.
        read: what it reads.
        rows: which rows.
        vision_IS: for `weigh`: which columns are tokens of each image.
        weigh: what to make of heads and rows; None: their mean.
    """
    attention = layer.self_attn
    device, states_BSD, cos_BSE, sin_BSE = _here(layer, read)
    keys_BKTE = _keys(attention, states_BSD, cos_BSE, sin_BSE)
    if read.past_BKPE is not None:
        keys_BKTE = torch.cat([read.past_BKPE.to(keys_BKTE), keys_BKTE], 2)
    prompts_I, columns_IR, real_IR = (each.to(device) for each in rows)
    where = (prompts_I[:, None], columns_IR)
    queries_IHRE = _rotated(attention, _heads(attention, states_BSD[where], "q"), cos_BSE[where], sin_BSE[where])
    past = keys_BKTE.shape[2] - states_BSD.shape[1]
    order_T = torch.arange(keys_BKTE.shape[2], device=device)
    mask_BT = read.mask_BS.to(device).bool()
    vision_IT = None if vision_IS is None else torch.nn.functional.pad(vision_IS.to(device), (past, 0))
    found = []
    together = _together(queries_IHRE, keys_BKTE)
    for start in range(0, len(prompts_I), together):
        part = slice(start, start + together)
        prompts_i = prompts_I[part]
        seen_iRT = mask_BT[prompts_i][:, None] & (order_T <= columns_IR[part][..., None] + past)
        scores_iHRT = _products(queries_IHRE[part].float(), keys_BKTE[prompts_i].float()) * attention.scaling
        weights_iHRT = scores_iHRT.masked_fill(~seen_iRT[:, None], -torch.inf).softmax(3)
        if weigh is not None and vision_IT is not None:
            near = partial(_near, attention, cos_BSE, sin_BSE, (prompts_i, columns_IR[part]), past)
            found.append(weigh(HeadRows(weights_iHRT, real_IR[part], vision_IT[part], near))[:, past:])
            continue
        counts_i1 = real_IR[part].sum(1, keepdim=True)
        found.append((weights_iHRT.mean(1) * real_IR[part][..., None]).sum(1)[:, past:] / counts_i1)
    return torch.cat(found).to(read.states_BSD.device)


@torch.no_grad()
def key_lengths(layer: Any, read: Read) -> Tensor:
    """Sum of the absolute values of each column's keys, at their positions, over all heads, [B, S] float32."""
    _, states_BSD, cos_BSE, sin_BSE = _here(layer, read)
    keys_BKSE = _keys(layer.self_attn, states_BSD, cos_BSE, sin_BSE)
    return keys_BKSE.float().abs().sum((1, 3)).to(read.states_BSD.device)


def _here(layer: Any, read: Read) -> tuple[torch.device, Tensor, Tensor, Tensor]:
    """Where the layer computes, and there: its normed states, and cosines and sines of their positions."""
    project = layer.self_attn.q_proj  # packed weights may be buffers
    device = next((held.device for held in (*project.parameters(), *project.buffers())), read.states_BSD.device)
    if device.type == "meta":  # its weights come from elsewhere when it runs
        device = read.states_BSD.device
    states_BSD = layer.input_layernorm(read.states_BSD.to(device))
    cos_BSE, sin_BSE = (each.to(device).expand(len(states_BSD), -1, -1) for each in read.rotation)
    return device, states_BSD, cos_BSE, sin_BSE


def _keys(attention: Any, states_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    return _rotated(attention, _heads(attention, states_BSD, "k"), cos_BSE, sin_BSE)


def _near(
    attention: Any, cos_BSE: Tensor, sin_BSE: Tensor, where: tuple[Tensor, Tensor], past: int
) -> Tensor:  # fmt: skip
    """How alike positions of rows and columns are to queries and keys of ones, [i, R, T]; 1 where there is a past."""
    ones_B1SE = torch.ones_like(cos_BSE)[:, None].float()
    turned_BSE = _rotated(attention, ones_B1SE, cos_BSE.float(), sin_BSE.float())[:, 0]
    prompts_i, columns_iR = where
    near_iRS = turned_BSE[prompts_i[:, None], columns_iR] @ turned_BSE[prompts_i].transpose(1, 2)
    return torch.nn.functional.pad(near_iRS / turned_BSE.shape[2], (past, 0), value=1.0)


def _heads(attention: Any, states_XTD: Tensor, kind: str) -> Tensor:
    """Queries or keys of each head, [X, heads, T, E], as the model makes them."""
    made_XTC = getattr(attention, f"{kind}_proj")(states_XTD)
    made_XTHE = made_XTC.view(*made_XTC.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)
    normed_XTHE: Tensor = made_XTHE if norm is None else norm(made_XTHE)
    return normed_XTHE.transpose(1, 2)


def _rotated(attention: Any, heads_XHTE: Tensor, cos_XTE: Tensor, sin_XTE: Tensor) -> Tensor:
    """At their positions, by the function that the layer itself uses."""
    rotate = _rotary(attention)
    assert rotate is not None  # noqa: S101 - as `readable` has made sure
    rotated_XHTE: Tensor = rotate(heads_XHTE, heads_XHTE[:, :1], cos_XTE, sin_XTE)[0]
    return rotated_XHTE


def _rotary(attention: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function that turns queries and keys by their positions; it stands beside the class that uses it."""
    return getattr(inspect.getmodule(type(attention)), "apply_rotary_pos_emb", None)


def _products(queries_iHRE: Tensor, keys_iKTE: Tensor) -> Tensor:
    """Of every query with the keys of its group of heads, [i, H, R, T]."""
    images, heads, rows, width = queries_iHRE.shape
    grouped_iKXE = queries_iHRE.reshape(images, keys_iKTE.shape[1], -1, width)
    return (grouped_iKXE @ keys_iKTE.transpose(2, 3)).view(images, heads, rows, -1)


def _together(queries_IHRE: Tensor, keys_BKTE: Tensor) -> int:
    """Images whose attention fits into memory at the same time."""
    _, heads, rows, _ = queries_IHRE.shape
    _, groups, columns, width = keys_BKTE.shape
    return max(1, _NUMBERS // (columns * (groups * width + 2 * heads * rows)))
