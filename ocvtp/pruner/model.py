"""The OC-Pruner: projection, queries, slot attention and, for training, a decoder.

Letters: B images, N tokens (of the largest image of the batch), C token width, K slots, D slot width, S kept tokens.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocvtp.errors import BadInput
from ocvtp.pruner import checks, pretrained, reference
from ocvtp.pruner.config import PrunerConfig, check_number, check_whole
from ocvtp.pruner.decoder import DECODER_MODULES, MODES, Decoder
from ocvtp.pruner.layout import Grid, TokenLayout, layout
from ocvtp.pruner.provenance import TrainedFor
from ocvtp.pruner.seeding import batch_noise, slot_noise
from ocvtp.pruner.seeding import generator as seeded
from ocvtp.pruner.select import Selection, choose, everything
from ocvtp.pruner.slots import QUERY_MODULES, FromTokens, Projection, SlotAttention
from ocvtp.replay import Replays


@dataclass(frozen=True)
class PrunerOutput:
    """What the pruner makes of some images.

    Attributes:
        slots: [B, K, D].
        attention: [B, K, N], of the last iteration, softmax over slots; zero where there is no token.
        reconstruction: [B, N, C], or None.
    """

    slots: Tensor
    attention: Tensor
    reconstruction: Tensor | None


class SlotStart(NamedTuple):
    """What slots begin as: queries that are given, or whence their noise comes, as in `OCPruner.forward`."""

    queries: Tensor | None
    generator: torch.Generator | None
    seeds: Sequence[int] | None


class OCPruner(nn.Module):
    """Gathers vision tokens into slots and keeps the token that each slot attends to most.

    Attributes:
        config: what it is made of.
        trained_for: what it was trained for.
    """

    def __init__(self, config: PrunerConfig, trained_for: TrainedFor | None = None) -> None:
        """New weights, from PyTorch's own generator (`torch.manual_seed`)."""
        super().__init__()
        self.config = config
        self.trained_for = trained_for or TrainedFor()
        self.project = Projection(config)
        self.queries = QUERY_MODULES[config.queries](config)
        self.slot_attention = SlotAttention(config)
        if isinstance(self.queries, FromTokens):  # so that a slot begins with attention for tokens like its own
            self.slot_attention.to_q.load_state_dict(self.slot_attention.to_k.state_dict())
        self.decoder: Decoder | None = None if config.decoder is None else DECODER_MODULES[config.decoder](config)
        self._replays = Replays()
        self._noise_KD: Tensor
        self.register_buffer("_noise_KD", torch.empty(0, config.slot_dim), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, and of what it computes in."""
        return self.project.up.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.project.up.weight.device

    def forward(
        self,
        tokens: Tensor,
        num_slots: int | Sequence[int],
        queries: Tensor | None = None,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        grid: Grid | Sequence[Grid] | None = None,
        decode: str | Tensor = "auto",
        seeds: Sequence[int] | None = None,
        check_values: bool | None = None,
    ) -> PrunerOutput:
        """Slots, attention and, if there is a decoder, the rebuilt tokens.

        Args:
            tokens: [B, N, C], of any floating type; computed in that of the weights.
            num_slots: K, at most N; or one number for each image (K is then the largest, the rest stays unused).
            queries: [B, K, D], the initial slots themselves.
            generator: draws the noise of the initial slots, and what the decoder sees. Without it and without
                `seeds` the noise is always the same, or, with `query_noise="fresh"`, from PyTorch's own generator.
            mask: [B, N], True where there is a token; an image's tokens come first. None if everywhere.
            grid: height and width in tokens of all images or of each, for the decoder. None: the config's, if it has N
                tokens, else a square.
            decode: what the decoder sees of the tokens: `random`, as in training; `fixed`, the same few each time;
                `all`; a plan that `decoder.plan` made; `none` to leave it out. `auto` is `random` in training and
                otherwise what `eval_visible` says.
            seeds: one number for each image, from which (and `query_seed`) its noise follows.
            check_values: look for NaN and infinity, which waits for the device. None: on a CPU.

        Raises:
            BadInput: tokens of another shape, width or type, or not finite; more slots than tokens; no images; queries,
                mask, seeds or grid that do not fit.
        """
        tokens_BNC, mask_BN = self._tokens(tokens, mask, check_values)
        start = SlotStart(queries, generator, seeds)
        slots_BKD, attention_BKN, slot_mask_BK = self._aggregate(tokens_BNC, mask_BN, num_slots, start)
        rebuilt_BNC = None
        if self.decoder is not None and not (isinstance(decode, str) and decode == "none"):
            where = layout(tokens_BNC, mask_BN, grid, self.config)
            plan = self._plan(self.decoder, where, decode, generator)
            rebuilt_BNC = self.decoder(tokens_BNC, slots_BKD, plan, where, slot_mask_BK)
        elif self.decoder is None and (isinstance(decode, Tensor) or decode not in ("auto", "none")):
            raise BadInput(f"decode={decode!r}, but this pruner has no decoder")
        return PrunerOutput(slots_BKD, attention_BKN, rebuilt_BNC)

    def select(self, tokens: Tensor, keep: int | Sequence[int], **options: Any) -> Tensor:
        """The tokens to keep of each image: `indices_BS` of `select_details`, which has the same arguments.

        Returns:
            [B, keep], int64: exactly `keep` distinct indices an image in ascending order. With N <= keep all N are
            kept. -1 stands at the end where an image of a batch has fewer tokens than that, or with `fill="none"`.
        """
        return self.select_details(tokens, keep, **options).indices_BS

    @torch.no_grad()
    def select_details(
        self,
        tokens: Tensor,
        keep: int | Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        mask: Tensor | None = None,
        queries: Tensor | None = None,
        generator: torch.Generator | None = None,
        slots: int | Sequence[int] | None = None,
        top_k: int = 1,
        assignment: str | None = None,
        fill: str | None = None,
        fill_scores: Tensor | None = None,
        surplus: str | None = None,
        precision: str | None = None,
        check_values: bool | None = None,
        mass_power: float | None = None,
        handed_on: Tensor | None = None,
    ) -> Selection:
        """Eq. 7-8: the tokens that slots attend to most, and how they came about.

        Nothing here loops over images, slots or tokens or waits for the device, but for `surplus="hash"` and
        `check_values=True`.

        Args:
            tokens: [B, N, C].
            keep: tokens to keep of each image, or one number for each image.
            seeds: one number for each image; these four and `check_values` are as in `forward`.
            mask: [B, N].
            queries: [B, K, D].
            generator: of the noise.
            slots: how many; (keep + 1 if `extra_slot`) // top_k unless given, and max_slots of separate_gaussian.
            top_k: tokens that each slot picks.
            assignment: as in `PrunerConfig`, whose value holds unless given; so do those of the next two.
            fill: what makes up for picks that coincide.
            fill_scores: [B, N], for `fill="attention"`: of the tokens that no slot picked, the highest are added.
            surplus: which pick goes if there are too many.
            precision: `bf16` or `fp16` computes matrix products in that type, but for those of slots and tokens: three
                times faster where the hardware has it. Of a hundred picks one or two are others in bfloat16; of a
                thousand, in float16, at which CPUs are slow.
            check_values: look for NaN and infinity.
            mass_power: of `mass`; the config's value unless given.
            handed_on: [B, N, V], the same tokens in the layer that goes to the LLM, for `residual_of="handed_on"`.

        Raises:
            BadInput: as `forward`; keep, slots or top_k below 1, more slots than tokens, unknown options, scores that
                are missing or not wanted.
        """
        fill, assignment = fill or self.config.fill, assignment or self.config.assignment
        surplus = surplus or self.config.surplus
        checks.options(assignment=assignment, fill=fill, surplus=surplus)
        mass_power = self.config.mass_power if mass_power is None else mass_power
        check_number("mass_power", mass_power, 0)
        products = checks.precision(precision)
        check_whole("top_k", top_k, 1)
        tokens_BNC, mask_BN = self._tokens(tokens, mask, check_values)
        batch, count = tokens_BNC.shape[:2]
        judged_BNX = self.config.judged(tokens_BNC, handed_on, assignment)
        keeps = checks.numbers("keep", keep, batch)
        checks.fill_scores(fill, fill_scores, tokens_BNC)
        if min(keeps) >= count:
            return everything(batch, count, mask_BN, tokens_BNC.device)

        num_slots = self._slots_for(keeps, slots, top_k, count)
        start = SlotStart(queries, generator, seeds)
        attention_BKN, slot_mask_BK = self._attention(tokens_BNC, mask_BN, num_slots, start, products)
        exist_B1 = torch.full((1, 1), count) if mask_BN is None else mask_BN.sum(1, keepdim=True)
        keep_B1 = torch.tensor(keeps)[:, None].to(exist_B1.device, non_blocking=True).minimum(exist_B1)
        if fill == "random":
            fill_scores = self._random_scores(batch, count, start)
        return choose(
            attention_BKN.float(),
            keep_B1.to(tokens_BNC.device, non_blocking=True),
            min(max(keeps), count),
            top_k=min(top_k, count),
            assignment=assignment,
            fill=fill,
            fill_scores_BN=None if fill_scores is None else fill_scores.to(tokens_BNC.device).float(),
            surplus=surplus,
            mask_BN=mask_BN,
            slot_mask_BK=slot_mask_BK,
            tokens_BNC=judged_BNX,
            mass_power=mass_power,
        )

    def save_pretrained(self, folder: Path | str, *, include_decoder: bool = True) -> None:
        """Write config.json and model.safetensors; without the decoder nine tenths smaller, and it still prunes."""
        pretrained.save(self, Path(folder), include_decoder=include_decoder)

    @classmethod
    def from_pretrained(
        cls, name: Path | str, *, decoder: bool = True, device: torch.device | str = "cpu", revision: str | None = None
    ) -> "OCPruner":
        """Read what `save_pretrained` wrote, from a folder or the Hugging Face hub, in evaluation mode.

        Args:
            name: a folder, or the id of a repository on the hub.
            decoder: whether to read the decoder, if it was saved; pruning does not need it.
            device: where to put the weights.
            revision: of the repository on the hub.

        Raises:
            NotAvailable: there is no such folder, and the hub has no such repository or cannot be reached.
            Corrupt: a file is damaged or half-written.
            Incompatible: weights that do not fit the config; all names and shapes that differ are listed.
        """
        pruner = pretrained.load(cls, name, decoder=decoder, device=device, revision=revision)
        # The buffer of fixed noise is not saved: begin it anew.
        pruner._noise_KD = torch.empty(0, pruner.config.slot_dim, device=pruner.device, dtype=pruner.dtype)
        return pruner

    @classmethod
    def from_reference_checkpoint(cls, path: Path | str, config: PrunerConfig | None = None) -> "OCPruner":
        """Read the authors' `weights.pth`: see `ocvtp.pruner.reference.load`."""
        return reference.load(cls, path, config)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the config and of the weights that prune: equal if and only if it prunes alike."""
        return pretrained.fingerprint(self)

    def _tokens(self, tokens: Tensor, mask: Tensor | None, check_values: bool | None) -> tuple[Tensor, Tensor | None]:
        """Checked tokens in the type of the weights, zero where there is none, and the mask."""
        checks.tokens(tokens, self.config.token_dim, self.device)
        if mask is not None:
            mask = checks.mask(mask, tokens)
            tokens = tokens.masked_fill(~mask[:, :, None], 0)
        if check_values or (check_values is None and tokens.device.type == "cpu"):
            checks.finite(tokens)
        return tokens.to(self.dtype), mask

    def _aggregate(
        self, tokens_BNC: Tensor, mask_BN: Tensor | None, num_slots: int | Sequence[int], start: SlotStart,
        *, exact: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Eq. 6: slots, attention, and which slots exist (None: all)."""
        slots, slot_mask_BK = self._existing(tokens_BNC, num_slots)
        batch, most = len(slots), max(slots)
        encoded_BND = self.project(tokens_BNC)
        if start.queries is None and isinstance(self.queries, FromTokens):
            queries_BKD = self.queries(tokens_BNC, encoded_BND, slots, mask_BN)
        else:
            queries_BKD = self._queries(batch, most, start)
        slots_BKD, attention_BKN = self.slot_attention(encoded_BND, queries_BKD, mask_BN, slot_mask_BK, exact=exact)
        return slots_BKD, attention_BKN, slot_mask_BK

    def _existing(self, tokens_BNC: Tensor, num_slots: int | Sequence[int]) -> tuple[list[int], Tensor | None]:
        """Slots of each image, and which of a batch exist (None: all)."""
        batch, count = tokens_BNC.shape[:2]
        slots = checks.numbers("num_slots", num_slots, batch)
        most = max(slots)
        if most > count:
            raise BadInput(f"num_slots is {most} for images of {count} tokens: at most one slot a token is possible")
        self.queries.check(most)
        if min(slots) == most:
            return slots, None
        exist_BK = torch.arange(most) < torch.tensor(slots)[:, None]
        return slots, exist_BK.to(tokens_BNC.device, non_blocking=True)

    def _attention(
        self,
        tokens_BNC: Tensor,
        mask_BN: Tensor | None,
        num_slots: int | Sequence[int],
        start: SlotStart,
        products: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, and which slots exist (None: all), without gradients; replayed where all images are alike.

        `products` is the type of matrix products with weights, if it is another than that of the weights.
        """
        exact = products is not None

        def precision() -> Any:
            # Without its cache of weights, whose memory a recorded graph would outlive.
            return torch.autocast(self.device.type, products, cache_enabled=False) if exact else nullcontext()

        slots, slot_mask_BK = self._existing(tokens_BNC, num_slots)
        of_tokens = start.queries is None and isinstance(self.queries, FromTokens)
        if self.training or mask_BN is not None or slot_mask_BK is not None or of_tokens:
            with precision():
                return self._aggregate(tokens_BNC, mask_BN, num_slots, start, exact=exact)[1:]

        def gathered(tokens_BNC: Tensor, queries_BKD: Tensor) -> Tensor:
            with precision():
                encoded_BND = self.project(tokens_BNC)
                attention_BKN: Tensor = self.slot_attention(encoded_BND, queries_BKD, exact=exact)[1]
            return attention_BKN

        with precision():
            queries_BKD = self._queries(len(slots), slots[0], start)
        places = tuple(
            weight.data_ptr() for part in (self.project, self.slot_attention) for weight in part.parameters()
        )
        return self._replays((products, places), gathered, tokens_BNC, queries_BKD), None

    def _queries(self, batch: int, slots: int, start: SlotStart) -> Tensor:
        width, (queries, generator, seeds) = self.config.slot_dim, start
        if queries is not None:
            if tuple(queries.shape) != (batch, slots, width):
                raise BadInput(f"queries {list(queries.shape)}: [{batch}, {slots}, {width}] is needed")
            return queries.to(self.device, self.dtype)
        if seeds is not None:
            noise_BKD = batch_noise(self.config.query_seed, checks.seeds(seeds, batch), slots, width)
        elif generator is not None:
            noise_BKD = torch.randn(batch, slots, width, generator=generator, device=generator.device)
        elif self.config.query_noise == "fresh":
            noise_BKD = torch.randn(batch, slots, width, device=self.device)
        else:
            noise_BKD = self._fixed_noise(slots).expand(batch, -1, -1)
        return self.queries(noise_BKD.to(self.device, self.dtype, non_blocking=True))  # type: ignore[no-any-return]

    def _fixed_noise(self, slots: int) -> Tensor:
        """The noise of sample 0, [K, D], kept on the device: noise for fewer slots is a part of it."""
        if len(self._noise_KD) < slots:
            # Read from the seed as a whole, never as an addition to what is there.
            size = max(64, 1 << (slots - 1).bit_length())
            noise_KD = slot_noise(self.config.query_seed, 0, size, self.config.slot_dim)
            self._noise_KD = noise_KD.to(self.device, self.dtype)
        return self._noise_KD[:slots]

    def _plan(
        self, decoder: Decoder, where: TokenLayout, decode: str | Tensor, generator: torch.Generator | None
    ) -> Tensor | None:
        if isinstance(decode, Tensor):
            return decode.to(self.device)
        if decode == "auto":
            share = "fixed" if self.config.eval_visible == "share" else "all"
            decode = "random" if self.training else share
        if decode not in MODES:
            raise BadInput(f"decode is {decode!r}: auto, none, a plan or one of {', '.join(MODES)} is needed")
        if decode == "random" and (generator is None or generator.device.type != "cpu"):
            generator = seeded("ocvtp plan", self.config.query_seed if generator is None else generator.initial_seed())
        return decoder.plan(where, decode, generator)

    def _slots_for(
        self, keeps: list[int], slots: int | Sequence[int] | None, top_k: int, count: int
    ) -> int | Sequence[int]:
        if slots is not None:
            return slots
        if self.config.max_slots is not None:
            return self.config.max_slots
        extra = int(self.config.extra_slot)
        return [min(count, max(1, (keep + extra) // top_k)) for keep in keeps]

    def _random_scores(self, batch: int, count: int, start: SlotStart) -> Tensor:
        _, generator, seeds = start
        if seeds is not None:
            rows = [torch.rand(count, generator=seeded("ocvtp fill", self.config.query_seed, seed)) for seed in seeds]
            return torch.stack(rows)
        if generator is None:
            generator = seeded("ocvtp fill", self.config.query_seed, 0)
            return torch.rand(1, count, generator=generator).expand(batch, -1)
        return torch.rand(batch, count, generator=generator, device=generator.device)
