"""Prompts on their way through the language model, which grow shorter between its layers.

How many tokens leave is known before, so that lengths and places are numbers on the CPU; which ones is decided where
the model is. Rows with less than others are padded on the side where the prompts have their padding.

Letters: B prompts, S columns, I images, G images of a group, N tokens of an image, d of them dropped, c made of those,
R rows of attention of an image, P rows of positions (1, or 3 for M-RoPE), D width of the LLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ocvtp.methods.inside import Step
from ocvtp.pruning.attention import Rows
from ocvtp.pruning.splice import Positions, Spliced, Spot

MergeTokens = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Span:
    """Tokens of an image: they stand side by side in one prompt.

    Attributes:
        row: the prompt.
        place: tokens of the prompt before them.
        start: their first column.
        count: how many they are.
    """

    row: int
    place: int
    start: int
    count: int


@dataclass(frozen=True)
class Prompts:
    """Prompts between two layers.

    Attributes:
        columns_BS: the caller's column that each column comes from; -1 for padding.
        mask_BS: 1 for tokens, 0 for padding.
        positions_PBS: of the tokens.
        lengths: tokens of each prompt.
        right: padding stands on the right.
        spans: of the images.
        numbers_IN: number of each token in its image; -1 for merged ones, for what is no token (the ends of rows in
            LLaVA-NeXT), and where an image has fewer than others.
        rows: of attention, for each image.
        vision_asks: some of these rows may be those of image tokens, which then must not leave.
    """

    columns_BS: Tensor
    mask_BS: Tensor
    positions_PBS: Tensor
    lengths: list[int]
    right: bool
    spans: list[Span]
    numbers_IN: Tensor
    rows: Rows
    vision_asks: bool

    @property
    def full(self) -> bool:
        """There is no padding."""
        return all(length == self.mask_BS.shape[1] for length in self.lengths)

    def vision(self, columns_IS: Tensor) -> Tensor:
        """Of something with an entry a column those of each image's tokens, [I, N]."""
        return columns_IS.gather(1, self.places()[0])

    def guarded(self, scores_IN: Tensor) -> Tensor:
        """Scores of images' tokens: -inf where an image has fewer than others, inf for tokens that ask."""
        columns_IN, there_IN = self.places()
        scores_IN = scores_IN.masked_fill(~there_IN, -torch.inf)
        if not self.vision_asks:
            return scores_IN
        asks_IS = torch.zeros(len(scores_IN), self.mask_BS.shape[1], dtype=torch.bool, device=scores_IN.device)
        asks_IS = asks_IS.scatter(1, self.rows.columns_IR, value=True)
        return scores_IN.masked_fill(asks_IS.gather(1, columns_IN) & there_IN, torch.inf)

    def places(self) -> tuple[Tensor, Tensor]:
        """The columns of each image's tokens, [I, N], filled up with its first, and which of them are there."""
        device = self.mask_BS.device
        starts_I1 = torch.tensor([[span.start] for span in self.spans], device=device)
        counts_I1 = torch.tensor([[span.count] for span in self.spans], device=device)
        order_N = torch.arange(max(span.count for span in self.spans), device=device)
        there_IN = order_N < counts_I1
        return starts_I1 + order_N * there_IN, there_IN

    def asked_by(self, raters: Sequence[Tensor], texts: Sequence[Sequence[int]]) -> "Prompts":
        """With rows of attention for those of each image's text tokens that rate it; as before if none does."""
        columns, real = list[Tensor](), list[Tensor]()
        for image, (rates_T, text) in enumerate(zip(raters, texts, strict=True)):
            before_R, kept_R = self.rows.columns_IR[image], self.rows.real_IR[image]
            asks_T = before_R.new_tensor(list(text))
            none = ~rates_T.any() if len(text) else torch.ones((), dtype=torch.bool, device=before_R.device)
            # A row that does not count is one that could: its attention must be numbers.
            columns.append(torch.cat([before_R, torch.where(rates_T, asks_T, before_R[0])]))
            real.append(torch.cat([kept_R & none, rates_T]))
        columns_IR = pad_sequence(columns, batch_first=True, padding_value=-1)
        columns_IR = torch.where(columns_IR < 0, columns_IR[:, :1], columns_IR)
        rows = Rows(self.rows.prompts_I, columns_IR, pad_sequence(real, batch_first=True))
        return replace(self, rows=rows)

    # --- Shorter -----------------------------------------------------------------------------------------------------

    def stay(self, steps: Sequence[Step]) -> bool:
        """Steps, one an image, of which none drops anything."""
        return all(step.kept == span.count and not step.merged for step, span in zip(steps, self.spans, strict=True))

    def shorter(
        self, states_BSD: Tensor, scores_IN: Tensor, steps: Sequence[Step], merge: MergeTokens, mode: Positions
    ) -> tuple["Prompts", Tensor]:
        """What goes on, and its hidden states.

        Args:
            states_BSD: of all columns.
            scores_IN: of the images' tokens. The highest stay; of equals the first.
            steps: how many, one an image.
            merge: makes tokens of dropped ones.
            mode: how those that stay are numbered.
        """
        if self.stay(steps):
            return self, states_BSD
        stays_IN = self._stays(scores_IN, steps)
        columns_IN, there_IN = self.places()
        length = self.mask_BS.shape[1]
        # Where an image has fewer tokens than others, what would be written falls into a column that is cut off.
        marks_BX = torch.nn.functional.pad(self.mask_BS.bool(), (0, 1))
        outside_IN = columns_IN.masked_fill(~there_IN, length)
        stays_BS = marks_BX.index_put((self.rows.prompts_I[:, None], outside_IN), stays_IN)[:, :length].clone()
        # Columns go in the order of these keys; merged tokens come right after the last token of their image.
        most = max(step.merged for step in steps)
        keys_BS = (torch.arange(length, device=stays_BS.device) * (most + 1)).expand_as(stays_BS).clone()
        numbers_IN = _first(self.numbers_IN, stays_IN, max(step.tokens for step in steps))
        for (count, step), members in _alike(self.spans, steps).items():
            if not step.merged:
                continue
            members_G = torch.tensor(members, device=scores_IN.device)
            rows_G1, starts_G1 = self.rows.prompts_I[members_G][:, None], columns_IN[members_G, :1]
            dropped_Gd = starts_G1 + _where(~stays_IN[members_G, :count], count - step.kept)
            scores_Gd = scores_IN[members_G].gather(1, dropped_Gd - starts_G1)
            merged_GcD, centres_Gc = merge(states_BSD[rows_G1, dropped_Gd], scores_Gd, step.merged)
            columns_Gc = dropped_Gd.gather(1, centres_Gc)
            states_BSD = states_BSD.index_put((rows_G1, columns_Gc), merged_GcD)
            stays_BS[rows_G1, columns_Gc] = True
            last_G1 = (starts_G1 + count - 1) * (most + 1)
            keys_BS[rows_G1, columns_Gc] = last_G1 + 1 + torch.arange(step.merged, device=scores_IN.device)
        return self._arranged(states_BSD, stays_BS, keys_BS, steps, numbers_IN, mode)

    def _stays(self, scores_IN: Tensor, steps: Sequence[Step]) -> Tensor:
        """The highest scores of each image, [I, N] bool."""
        kept_I1 = torch.tensor([[step.kept] for step in steps], device=scores_IN.device)
        order_IN = scores_IN.argsort(dim=1, descending=True, stable=True)
        ranks_N = torch.arange(scores_IN.shape[1], device=scores_IN.device)
        return torch.zeros_like(scores_IN, dtype=torch.bool).scatter(1, order_IN, ranks_N < kept_I1)

    def _arranged(
        self, states_BSD: Tensor, stays_BS: Tensor, keys_BS: Tensor, steps: Sequence[Step], numbers_IN: Tensor,
        mode: Positions,
    ) -> tuple["Prompts", Tensor]:  # fmt: skip
        """The columns that stay, in the order of their keys."""
        gone = [0] * len(self.lengths)
        for span, step in zip(self.spans, steps, strict=True):
            gone[span.row] += span.count - step.tokens
        lengths = [length - less for length, less in zip(self.lengths, gone, strict=True)]
        length = max(lengths)
        fill = int(torch.iinfo(keys_BS.dtype).max) if self.right else -1
        order_BS = torch.where(stays_BS, keys_BS, fill).argsort(dim=1, stable=True)
        order_BS = order_BS[:, :length] if self.right else order_BS[:, -length:]
        mask_BS = stays_BS.gather(1, order_BS).to(self.mask_BS.dtype)
        positions_PBS = self.positions_PBS.gather(2, order_BS.expand(len(self.positions_PBS), -1, -1))
        if mode == "compact":
            # Whoever comes n places further to the front has a position less by n.
            before_BS = (self.mask_BS.cumsum(1) - 1).gather(1, order_BS)
            positions_PBS = positions_PBS - (before_BS - (mask_BS.cumsum(1) - 1))
        columns_BS = self.columns_BS.gather(1, order_BS).masked_fill(mask_BS == 0, -1)
        news_BS = torch.arange(length, device=order_BS.device).expand_as(order_BS)
        now_BS = torch.zeros_like(keys_BS).scatter(1, order_BS, news_BS)
        rows = self.rows._replace(columns_IR=now_BS[self.rows.prompts_I].gather(1, self.rows.columns_IR))
        prompts = replace(
            self,
            columns_BS=columns_BS,
            mask_BS=mask_BS,
            positions_PBS=positions_PBS.masked_fill(mask_BS == 0, 0),
            lengths=lengths,
            spans=self._spans(steps, lengths, length),
            numbers_IN=numbers_IN,
            rows=rows,
        )
        return prompts, states_BSD.gather(1, order_BS[..., None].expand(-1, -1, states_BSD.shape[2]))

    def _spans(self, steps: Sequence[Step], lengths: Sequence[int], length: int) -> list[Span]:
        """Where the images' tokens stand now."""
        spans = []
        for span, step in zip(self.spans, steps, strict=True):
            place = span.place - sum(
                other.count - its.tokens
                for other, its in zip(self.spans, steps, strict=True)
                if other.row == span.row and other.place < span.place
            )
            start = place if self.right else place + length - lengths[span.row]
            spans.append(Span(span.row, place, start, step.tokens))
        return spans


def prompts_of(spliced: Spliced, near: Spliced, spots: Sequence[Spot], asks: Sequence[Sequence[int]]) -> Prompts:
    """Whole prompts before the first layer.

    Args:
        spliced: nothing of them has been dropped.
        near: the same on the CPU.
        spots: of the images.
        asks: columns of each prompt whose attention ranks its images; one at least where there are any.
    """
    device = spliced.mask_BS.device
    spans = []
    for spot in spots:
        start = int((near.columns_BS[spot.row] == spot.columns_X[0]).nonzero()[0])
        spans.append(Span(spot.row, int(near.mask_BS[spot.row, :start].sum()), start, len(spot.places_X)))
    columns = [torch.tensor(asks[span.row], device=device) for span in spans]
    columns_IR = pad_sequence(columns, batch_first=True, padding_value=-1)
    rows = Rows(
        torch.tensor([span.row for span in spans], device=device),
        torch.where(columns_IR < 0, columns_IR[:, :1], columns_IR),
        columns_IR >= 0,
    )
    numbers = [spot.numbers_X.to(device) for spot in spots]
    return Prompts(
        columns_BS=spliced.columns_BS,
        mask_BS=spliced.mask_BS,
        positions_PBS=spliced.positions_PBS,
        lengths=near.mask_BS.sum(1).tolist(),
        right=spliced.right,
        spans=spans,
        numbers_IN=pad_sequence(numbers, batch_first=True, padding_value=-1),
        rows=rows,
        vision_asks=any(span.start <= ask < span.start + span.count for span in spans for ask in asks[span.row]),
    )


def _alike(spans: Sequence[Span], steps: Sequence[Step]) -> dict[tuple[int, Step], list[int]]:
    """Images with as many tokens, of which as many stay."""
    groups: dict[tuple[int, Step], list[int]] = {}
    for image, (span, step) in enumerate(zip(spans, steps, strict=True)):
        groups.setdefault((span.count, step), []).append(image)
    return groups


def _where(true_XN: Tensor, number: int) -> Tensor:
    """Where each row is true, ascending, [X, number]; it is so at as many places."""
    return (~true_XN).to(torch.uint8).argsort(dim=1, stable=True)[:, :number]


def _first(numbers_IN: Tensor, stays_IN: Tensor, width: int) -> Tensor:
    """Numbers of what stays, in their order, then -1, [I, width]."""
    order_IN = (~stays_IN).to(torch.uint8).argsort(dim=1, stable=True)
    kept_IN = torch.where(stays_IN, numbers_IN, -1).gather(1, order_IN)
    return torch.nn.functional.pad(kept_IN, (0, max(0, width - kept_IN.shape[1])), value=-1)[:, :width]
