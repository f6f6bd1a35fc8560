"""The published training loop, written plainly: what `benchmarks/pruner.py` compares with.

Single precision, PyTorch's own modules, one permutation a sample, shuffled and unshuffled, all iterations of slot
attention inside the graph: as the authors' repository describes it, with none of its files. Weights have the authors'
names, so that `OCPruner` reads them.

Letters: B images, N tokens, C token width, K slots, D slot width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear; with a norm before where asked for."""

    def __init__(self, width: int, hidden: int, out: int, *, norm: bool, dropout: float) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out)]
        self.mlp = nn.Sequential(*([nn.LayerNorm(width)] if norm else []), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class SharedGaussian(nn.Module):
    """Initial slots."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean, self.logstd = (nn.Parameter(torch.empty(1, 1, width)) for _ in range(2))
        nn.init.xavier_uniform_(self.mean)
        nn.init.xavier_uniform_(self.logstd)

    def forward(self, noise_BKD: Tensor) -> Tensor:
        return self.mean + noise_BKD * self.logstd.exp()


class SlotAttention(nn.Module):
    """Three iterations, all of them in the graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in, self.norm_slots_0, self.norm_slots_1 = (nn.LayerNorm(width) for _ in range(3))
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(width, width)
        self.ffn = Mlp(width, 4 * width, width, norm=False, dropout=0.01)

    def forward(self, encoded_BND: Tensor, queries_BKD: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BND = self.norm_in(encoded_BND)
        k_BND, v_BND = self.proj_k(tokens_BND), self.proj_v(tokens_BND)
        slots_BKD = queries_BKD
        for iteration in range(3):
            if iteration == 2:
                slots_BKD = slots_BKD.detach() + queries_BKD - queries_BKD.detach()
            q_BKD = self.proj_q(self.norm_slots_0(slots_BKD))
            attention_BKN = (torch.einsum("bkd,bnd->bkn", q_BKD, k_BND) * q_BKD.shape[-1] ** -0.5).softmax(1)
            share_BKN = attention_BKN / (attention_BKN.sum(2, keepdim=True) + 1e-5)
            update_BKD = torch.einsum("bkn,bnd->bkd", share_BKN, v_BND)
            slots_BKD = self.gru(update_BKD.flatten(0, 1), slots_BKD.flatten(0, 1)).view_as(slots_BKD)
            slots_BKD = slots_BKD + self.ffn(self.norm_slots_1(slots_BKD))
        return slots_BKD, attention_BKN


class Projection(nn.Module):
    """Linear without bias, then a norm."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(width, out, bias=False), nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.project(x))


class PositionEmbedding(nn.Module):
    """A learnt table."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self._pe = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, width), std=1.0))


class RandomAR(nn.Module):
    """The decoder: shuffle, hide, predict all, unshuffle."""

    def __init__(self, count: int, width: int, slot_width: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.posit_embed = PositionEmbedding(count, width)
        self.project1, self.project2 = Projection(width, width), Projection(slot_width, width)
        layer = nn.TransformerDecoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False
        )
        self.backbone = nn.TransformerDecoder(layer, 4)
        self.norm0 = self.backbone.layers[0].norm1
        self.backbone.layers[0].norm1 = nn.Identity()

    def forward(self, tokens_BNC: Tensor, slots_BKD: Tensor, generator: torch.Generator) -> Tensor:
        batch, count, width = tokens_BNC.shape
        device = tokens_BNC.device
        order_BN = torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)]).to(device)
        draw_B = torch.rand(batch, generator=generator)
        some_B = torch.randint(0, count - 1, (batch,), generator=generator)
        shown_B1 = torch.where(draw_B < 0.5, some_B, 24)[:, None].to(device)
        index_BNC = order_BN[:, :, None].expand(-1, -1, width)
        shuffled_BNC = self.project1(tokens_BNC).gather(1, index_BNC)
        seen_BN1 = (torch.arange(count, device=device) < shown_B1)[:, :, None]
        query_BNC = torch.where(seen_BN1, shuffled_BNC, self.mask_token)
        query_BNC = query_BNC + self.posit_embed._pe.expand(batch, -1, -1).gather(1, index_BNC)
        out_BNC = self.backbone(self.norm0(query_BNC), self.project2(slots_BKD))
        return out_BNC.gather(1, order_BN.argsort(1)[:, :, None].expand(-1, -1, width))


class PlainPruner(nn.Module):
    """The whole model."""

    def __init__(self, width: int = 1024, slot_width: int = 512, count: int = 576) -> None:
        super().__init__()
        self.encode_project = Mlp(width, 2 * width, slot_width, norm=True, dropout=0.0)
        self.initializ = SharedGaussian(slot_width)
        self.aggregat = SlotAttention(slot_width)
        self.decode = RandomAR(count, width, slot_width)

    def forward(self, tokens_BNC: Tensor, noise_BKD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rebuilt tokens, and the attention of the last iteration."""
        slots_BKD, attention_BKN = self.aggregat(self.encode_project(tokens_BNC), self.initializ(noise_BKD))
        return self.decode(tokens_BNC, slots_BKD, generator), attention_BKN


def area_weighted(rebuilt_BNC: Tensor, tokens_BNC: Tensor, attention_BKN: Tensor) -> Tensor:
    """AW-MSE with its empty slots."""
    attention_BKN = attention_BKN.detach()
    hard_BNK = F.one_hot(attention_BKN.argmax(1), attention_BKN.shape[1]).float()
    weight_BK = hard_BNK.mean(1).clamp(min=1e-8) ** -0.5
    weight_BK = (weight_BK / weight_BK.mean(1, keepdim=True)).clamp(max=10)
    weight_BN = torch.einsum("bkn,bk->bn", attention_BKN, weight_BK)
    error_BN = (rebuilt_BNC - tokens_BNC).square().mean(2)
    return ((weight_BN * error_BN).sum(1) / weight_BN.sum(1)).mean()
