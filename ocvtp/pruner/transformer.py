"""The transformer inside two of the decoders: pre-norm decoder layers without biases.

Letters: B images, N tokens, C token width, K slots, H heads, E width of a head (C = H * E).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocvtp.pruner.config import PrunerConfig


class Attention(nn.Module):
    """Multi-head attention; weights named and begun as PyTorch's `nn.MultiheadAttention` without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.out_proj = nn.Linear(width, width, bias=False)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x_BNC: Tensor, memory_BMC: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend to the memory, or (None) to oneself; `mask`, broadcast to [B, H, N, M], is True where one may look."""
        if memory_BMC is None:
            parts = F.linear(x_BNC, self.in_proj_weight).chunk(3, -1)
        else:
            width = x_BNC.shape[-1]
            query_weight, memory_weight = self.in_proj_weight[:width], self.in_proj_weight[width:]
            parts = (F.linear(x_BNC, query_weight), *F.linear(memory_BMC, memory_weight).chunk(2, -1))
        q_BHNE, k_BHME, v_BHME = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        mixed_BHNE = attend(q_BHNE, k_BHME, v_BHME, mask)
        return self.out_proj(mixed_BHNE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attend(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention.

    Fused, but for training on a CPU: the backward pass of PyTorch's fused kernel takes longer there than all else in a
    step together (measured with PyTorch 2.15 in bfloat16: 81 ms a layer, of which 4 ms are needed).
    """
    if q_BHNE.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=mask)
    logits_BHNM = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.transpose(-2, -1)
    if mask is not None:
        logits_BHNM = logits_BHNM.masked_fill(~mask, -torch.inf)
    weights_BHNM: Tensor = logits_BHNM.softmax(-1)
    return weights_BHNM @ v_BHME


class Layer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normed before and added; weights named as PyTorch's."""

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.decoder_ffn_dim
        self.self_attn = Attention(width, config.decoder_heads)
        self.multihead_attn = Attention(width, config.decoder_heads)
        self.linear1 = nn.Linear(width, hidden, bias=False)
        self.linear2 = nn.Linear(hidden, width, bias=False)
        self.norm1: nn.Module = nn.LayerNorm(width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.norm3 = nn.LayerNorm(width, bias=False)

    def forward(self, x_BNC: Tensor, memory_BKC: Tensor, mask: Tensor | None, memory_mask: Tensor | None) -> Tensor:
        """One layer; masks as in `Attention`."""
        x_BNC = x_BNC + self.self_attn(self.norm1(x_BNC), None, mask)
        x_BNC = x_BNC + self.multihead_attn(self.norm2(x_BNC), memory_BKC, memory_mask)
        return x_BNC + self.linear2(F.gelu(self.linear1(self.norm3(x_BNC))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Layers over an input that is normed once, before the first of them.

    The first layer's own norm is thereby moved to the front, so that what the layers add to is normed as well.
    """

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.token_dim, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.decoder_layers))
        if config.equal_layers:
            for layer in self.layers[1:]:
                layer.load_state_dict(self.layers[0].state_dict())
        self.layers[0].norm1 = nn.Identity()

    def forward(
        self,
        query_BNC: Tensor,
        memory_BKC: Tensor,
        mask_BN: Tensor | None = None,
        slot_mask_BK: Tensor | None = None,
        *,
        causal: bool = False,
    ) -> Tensor:
        """All layers.

        Args:
            query_BNC: the input.
            memory_BKC: what cross-attention looks at.
            mask_BN: True where there is a token; None if everywhere.
            slot_mask_BK: True where there is a slot; None if everywhere.
            causal: each token sees itself and those before it.
        """
        mask = None if mask_BN is None else mask_BN[:, None, None, :]
        memory_mask = None if slot_mask_BK is None else slot_mask_BK[:, None, None, :]
        if causal:
            count = query_BNC.shape[1]
            past_NN = torch.ones(count, count, dtype=torch.bool, device=query_BNC.device).tril()
            mask = past_NN if mask is None else mask & past_NN
        x_BNC: Tensor = self.norm(query_BNC)
        for layer in self.layers:
            x_BNC = layer(x_BNC, memory_BKC, mask, memory_mask)
        return x_BNC
