"""The model's own forward on prompts with fewer tokens than the caller's, and on what follows them.

Prompts that have images are shortened on their way into the language model, or between its layers; mask and positions
of what comes later are translated. `logits` of a prompt are those of its shortened form.

Letters: B prompts, L columns of the caller's prompts, S columns of the shortened ones, q new columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods import Budget, Method
from ocvtp.methods.inside import Inside
from ocvtp.pruning.decoder_layers import Decoding, Inputs, Layers, several_positions
from ocvtp.pruning.features import Features
from ocvtp.pruning.prefix import Held, Prefix
from ocvtp.pruning.shortening import counts_of, kept_of, loss_of, shortening
from ocvtp.pruning.splice import Positions, Spliced, Spot, cut, splice
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Images


@dataclass(frozen=True)
class EncodedCall:
    """Images of one call in `rows` prompts of `length` columns, encoded before the language model starts."""

    spots: list[Spot]
    rows: int
    length: int


@dataclass(frozen=True)
class Told:
    """What came of a prompt.

    Attributes:
        columns_BS: the caller's column that each column of the logits comes from; -1 for padding.
        kept: of each image, the numbers of the tokens that stayed; None: as they were chosen before the language model.
        layers: for each layer, the tokens of each image that it read; None likewise.
    """

    columns_BS: Tensor
    kept: list[list[int]] | None = None
    layers: list[list[int]] | None = None


class Forward:
    """Runs one model on shortened prompts."""

    def __init__(
        self, model: Any, family: Family, plain: Callable[..., Any], method: Method | None, budget: Budget,
        positions: Positions | None, default: Positions,
    ) -> None:  # fmt: skip
        """`positions` as the caller wants them, `default` as the method has them; `plain` is the model's own forward.

        Which of them it is in the end is `self.positions`.

        Raises:
            BadInput: positions that cannot be had.
            Incompatible: the method acts inside a language model whose layers it cannot read.
        """
        self._model, self._family, self._plain, self._budget = model, family, plain, budget
        places = self._several = several_positions(model.get_decoder().config)
        # M-RoPE's are places in a picture, which stay right whatever is dropped.
        self.positions: Positions = positions or ("original" if places else default)
        self._method = method if isinstance(method, Inside) else None
        self._layers = None
        if self._method is not None:
            if places and positions == "compact":
                raise BadInput(
                    f"positions='compact' cannot be had with {self._method.name} and M-RoPE, whose positions are "
                    "places in a picture: leave positions out, or say 'original'"
                )
            self.positions = "original" if places else self.positions
            self._layers = Layers(model, self._method, family.facts.added)
        self._features = Features(model.model)

    def remove(self) -> None:
        """Take hooks off the model."""
        self._features.remove()
        if self._layers is not None:
            self._layers.remove()

    def check(self, call: Mapping[str, Any], counts: Sequence[int]) -> None:
        """Refuse what cannot work before any work is done.

        Args:
            call: arguments of `generate` or `forward` that come with images.
            counts: tokens of each image.

        Raises:
            BadInput: a budget that cannot be reached, a cache that cannot be shortened, gradient checkpointing.
        """
        if self._layers is None or self._method is None:
            return
        self._layers.check(call.get("past_key_values"))
        for count in counts:
            keep = self._budget.at_most(count)
            self._method.planned(self._method.enter(count, keep), keep)

    def check_images(self, images: Images) -> None:
        """`BadInput` for videos under M-RoPE whose frames, which overlap in place, would be numbered anew."""
        if images.videos and self.positions == "compact" and self._several:
            raise BadInput("positions='compact' cannot be had with videos and M-RoPE: leave positions out")

    # --- Prompts -----------------------------------------------------------------------------------------------------

    def shortened(self, call: dict[str, Any], encoded: EncodedCall, rows: int) -> tuple[Any, Told]:
        """Run the model on prompts with the kept tokens only."""
        cache, ids_BL, mask_BL = call.get("past_key_values"), call["input_ids"], call.get("attention_mask")
        if mask_BL is not None and mask_BL.ndim != 2:
            raise BadInput(f"a pruned model needs a mask of two dimensions, not of shape {list(mask_BL.shape)}")
        if isinstance(call.get("logits_to_keep"), Tensor):
            raise BadInput("a pruned model needs logits_to_keep as a number: columns are others after pruning")
        spots = _repeated(encoded, rows)
        before_BS, positions_PBL, mask_BL = self._placed(call, cache, ids_BL, mask_BL)
        spliced = splice(mask_BL, positions_PBL, spots, self.positions)
        whole_BS = spliced.mask_BS if before_BS is None else torch.cat([before_BS, spliced.mask_BS], 1)
        full = bool(whole_BS.all())
        labels_BL = call.get("labels")
        call = self._rewritten(call, spliced)
        # Without a cache, transformers takes gaps in positions for the ends of prompts, unless there is a mask.
        call["attention_mask"] = None if full and self.positions == "compact" else whole_BS
        call["return_dict"], asked = True, call.get("return_dict")
        held: tuple[Held, ...] = ()
        told = Told(spliced.columns_BS)
        prefix, before = Prefix.of(cache), Prefix.covered(cache)
        layers = self._hooks(prefix)
        features = self._features.given(
            {kind: self._family.features(parts_XD, kind) for kind, parts_XD in spliced.features.items()}
        )
        if layers is None:
            with features as asking:
                output = self._plain(**call, **asking)
        else:
            labels_BS = call.pop("labels", None)
            assert self._method is not None  # noqa: S101 - else there are no layers
            run = shortening(
                layers, self._method, self._budget, spliced, spots, self.positions,
                labels_BS=labels_BS, length=encoded.length, before_BS=before_BS, prefix=prefix,
            )  # fmt: skip
            with features as asking, layers.running(run):
                output = self._plain(**call, **asking)
            copies = len(spots) // len(encoded.spots)
            told = Told(run.prompts.columns_BS, kept_of(run, copies), counts_of(run, copies))
            held = tuple(run.held)
            if labels_BL is not None:
                labels_BS = cut(labels_BL, told.columns_BS, -100)
                output = type(output)(**{**output, "loss": loss_of(self._model, output.logits, labels_BS, call)})
        if getattr(output, "past_key_values", None) is not None:
            columns = before + ids_BL.shape[1]
            Prefix(whole_BS, spliced.next_B, full, columns, held).remember(output.past_key_values)
        return (output if (self._model.config.return_dict if asked is None else asked) else output.to_tuple()), told

    def _placed(
        self, call: Mapping[str, Any], cache: Any, ids_BL: Tensor, mask_BL: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Mask of what is in the cache already, positions of the new columns if none were left out, and their mask."""
        batch, length = ids_BL.shape
        prefix = Prefix.of(cache)
        if prefix is not None:
            mask_BS, positions_Bt = prefix.since(cache, mask_BL, length, batch)
            mask_Bq = mask_BS[:, -length:]
            return mask_BS[:, :-length], self._family.spread(call, positions_Bt[:, -length:], mask_Bq), mask_Bq
        past = 0 if cache is None else cache.get_seq_length()
        if mask_BL is None:
            mask_BL = ids_BL.new_ones(batch, past + length)
        positions_PBL = self._family.positions(call, mask_BL, past)
        return (mask_BL[:, :past] if past else None), positions_PBL, mask_BL[:, past:]

    def spread(self, call: Mapping[str, Any]) -> Tensor:
        """Positions of new columns that hold images, as the model takes them, given those of as much text."""
        positions, length = call["position_ids"], call["input_ids"].shape[1]
        text_Bq = positions if positions.ndim == 2 else positions[-1]
        mask_BL = call.get("attention_mask")
        mask_Bq = torch.ones_like(call["input_ids"]) if mask_BL is None else mask_BL[:, -length:]
        return self._family.position_ids(self._family.spread(call, text_Bq[:, -length:], mask_Bq))

    def _rewritten(self, call: Mapping[str, Any], spliced: Spliced) -> dict[str, Any]:
        """The arguments of the shortened call, but for the mask."""
        ids_BL, columns = call["input_ids"], self._family.column_inputs
        dropped = {*self._family.vision_inputs, "mm_encoder_outputs"}  # which `generate` leaves empty
        rewritten = {
            **{name: value for name, value in call.items() if name not in dropped},
            **{
                name: spliced.gather(call[name][:, -ids_BL.shape[1] :], filler)
                for name, filler in columns.items()
                if call.get(name) is not None
            },
            "input_ids": spliced.gather(ids_BL, self._family.padding),
            "position_ids": self._family.position_ids(spliced.positions_PBS),
        }
        if call.get("labels") is not None:
            rewritten["labels"] = spliced.gather(call["labels"], -100)
        return rewritten

    # --- What follows ------------------------------------------------------------------------------------------------

    def continued(self, call: dict[str, Any], prefix: Prefix) -> Any:
        """Run the model on what follows pruned prompts."""
        new = next((call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None), None)
        if new is None:
            raise BadInput("a pruned model needs input_ids or inputs_embeds")
        batch, length = new.shape[:2]
        mask_BL = call.get("attention_mask")
        mask_BS, positions_Bt = prefix.since(call["past_key_values"], mask_BL, length, batch)
        tail = mask_BL is None or bool(mask_BS[:, prefix.mask_BS.shape[1] :].all())
        positions_PBq = positions_Bt[None, :, -length:]
        if call.get("position_ids") is not None and self._several and self.positions == "original":
            # As `generate` counts them: after a video in M-RoPE not from its largest position, as `forward` does.
            positions_PBq = self._family.positions(call, mask_BS, 0)
        dropped = {*self._family.vision_inputs, *self._family.column_inputs}
        call = {
            **{name: value for name, value in call.items() if name not in dropped},
            "attention_mask": None if prefix.full and tail else mask_BS,
            "position_ids": self._family.position_ids(positions_PBq),
        }
        layers = self._hooks(prefix)
        if layers is None or not prefix.later:
            return self._plain(**call)
        starts = {
            held.first: Inputs(
                prefix.whole(held.first, mask_BS),
                held.full and tail,
                positions_PBq + prefix.shift(held.first)[:, None],
            )
            for held in prefix.later
        }
        with layers.running(Decoding(layers.decoder, starts)):
            return self._plain(**call)

    def _hooks(self, prefix: Prefix | None) -> Layers | None:
        """The hooks, without which nothing can follow prompts that were shortened between layers."""
        if prefix is not None and prefix.later and self._layers is None:
            raise BadInput(
                "the cache was filled by a method inside the LLM, whose layers hold different tokens; a method before "
                "it cannot go on from there"
            )
        return self._layers


def _repeated(encoded: EncodedCall, rows: int) -> list[Spot]:
    """The spots of prompts that were repeated, each as often as the others, for beams or several answers."""
    if rows % encoded.rows:
        raise BadInput(f"{rows} prompts reached the model, which is no multiple of the {encoded.rows} that were given")
    copies = rows // encoded.rows
    return [replace(spot, row=spot.row * copies + copy) for spot in encoded.spots for copy in range(copies)]
