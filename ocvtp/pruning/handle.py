"""Pruning on one model: `generate` and `forward` are replaced on the instance, nothing else is touched.

The caller goes on to speak of whole prompts. `generate` looks at the images once and then runs as it is, on the
caller's own ids, mask and positions. `forward` shortens prompts that have images on their way into the language model,
and translates mask and positions of what follows. Returned sequences, streamers and stopping criteria therefore see
whole prompts; `logits` of a prompt are those of its shortened form (`Handle.last_columns` says of which columns).

Letters: B prompts, L columns of the caller's prompts, S columns of the shortened ones, q new columns.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods import Budget, Entry, Keep, Method, entry_of, options_of
from ocvtp.pruning import calls
from ocvtp.pruning.choosing import Choice, choose
from ocvtp.pruning.prefix import Prefix
from ocvtp.pruning.seeds import name_of, seeds_of
from ocvtp.pruning.splice import Positions, Spliced, Spot, splice
from ocvtp.vlms.base import family_of
from ocvtp.vlms.family import Family, Images


def prune(
    model: Any,
    method: str = "oc-vtp",
    keep: Keep | None = None,
    pruner: Any = None,
    *,
    seed: int = 0,
    positions: Positions = "compact",
    **options: Any,
) -> "Handle":
    """Prune the vision tokens of a model from now on, in place.

    Args:
        model: a supported model of transformers (`ocvtp.vlms.base.FAMILIES`), on any device.
        method: a name that `ocvtp methods` lists.
        keep: tokens an image (int), a share of them in (0, 1], or a percentage such as "11.1%". Only `vanilla` needs
            none.
        pruner: for `oc-vtp`: an `OCPruner`, a folder, or an id on the hub.
        seed: of methods with randomness. What is kept of an image depends on it and on the image alone.
        positions: `compact` numbers the shortened prompt anew, `original` leaves each token its position.
        options: of the method (`ocvtp.methods.REGISTRY[method].options`).

    Returns:
        A handle with `remove()`, usable as a context manager; `last_kept` lists what the last call kept.

    Raises:
        BadInput: unknown method, option or model class, keep out of range, a model that is pruned already.
        Incompatible: a pruner of another VLM, width or layer; both are named.
        NotAvailable: no pruner in that place.
    """
    entry = entry_of(method)
    family = family_of(model)
    if "_ocvtp_handle" in model.__dict__:
        raise BadInput("this model is pruned already: call remove() on its handle first")
    if positions not in ("compact", "original"):
        raise BadInput(f"positions is {positions!r}: compact or original is needed")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BadInput(f"seed is {seed!r}: a whole number is needed")
    if keep is None and entry.acts != "nowhere":
        raise BadInput(f"{method} needs keep: tokens an image, or a share of them")
    budget = Budget.parse(1.0 if keep is None else keep)
    if family.facts.tokens is not None:
        budget.tokens(family.facts.tokens)
    built = entry.build(family, pruner, options_of(entry, options))
    return Handle(model, entry, family, built, budget, seed, positions)


@dataclass(frozen=True)
class _Looked:
    """Images of one `generate`, looked at before it starts."""

    spots: list[Spot]
    rows: int


class Handle:
    """Pruning on one model.

    Attributes:
        model: the model.
        method: name of the method.
        keep: the budget as it was given.
        seed: of the run.
        last_kept: for each image of the last call, the numbers of the tokens that stayed, ascending.
        last_columns: [B, S]: the caller's column that each column of the last shortened prompts, and so of their
            logits, comes from; -1 for padding. None if they were not shortened.
    """

    def __init__(
        self, model: Any, entry: Entry, family: Family, method: Method | None, budget: Budget, seed: int,
        positions: Positions,
    ) -> None:  # fmt: skip
        self.model, self.method, self.keep, self.seed = model, entry.name, budget.written, seed
        self.last_kept: list[list[int]] = []
        self.last_columns: Tensor | None = None
        self._family, self._method, self._budget, self._positions = family, method, budget, positions
        self._samples: list[str] | None = None
        self._random, self._needs_text = entry.random, entry.needs_text
        self._running = threading.local()
        self._before = {name: model.__dict__[name] for name in ("generate", "forward") if name in model.__dict__}
        self._generate, self._forward = model.generate, model.forward
        model.generate = calls.Replacement(model.generate, self._pruned_generate)
        model.forward = calls.Replacement(model.forward, self._pruned_forward)
        model._ocvtp_handle = self

    def remove(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        if self.model.__dict__.get("_ocvtp_handle") is not self:
            return
        for name in ("generate", "forward", "_ocvtp_handle"):
            del self.model.__dict__[name]
        self.model.__dict__.update(self._before)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @contextmanager
    def samples(self, names: Sequence[object]) -> Iterator[None]:
        """Name the images of the calls within, one name an image: randomness then follows them, not the pixels."""
        self._samples = [str(name) for name in names]
        try:
            yield
        finally:
            self._samples = None

    # --- In place of the model's own -----------------------------------------------------------------------------

    def _pruned_generate(self, *args: Any, **kwargs: Any) -> Any:
        call = calls.by_name(self._generate, args, kwargs)
        if Prefix.of(call.get("past_key_values")) is not None:
            raise BadInput("generate cannot go on from a cache of pruned prompts: give the whole conversation anew")
        images = self._family.images(call)
        if images is None:
            self.last_kept = []
            return self._run_generate(None, call)
        if self._method is None:
            self.last_kept = [list(range(count)) for count in self._family.counts(images)]
            return self._run_generate(None, call)
        calls.refuse(call, self.model.generation_config)
        ids_BL = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
        with torch.no_grad():
            looked = self._look(self._method, ids_BL, call.get("attention_mask"), images)
        kept = {name: value for name, value in call.items() if name not in self._family.vision_inputs}
        return self._run_generate(looked, kept)

    def _run_generate(self, looked: _Looked | None, call: dict[str, Any]) -> Any:
        before = self._state()
        self._running.state = (True, looked)
        try:
            return self._generate(**call)
        finally:
            self._running.state = before

    def _state(self) -> tuple[bool, _Looked | None]:
        """Whether this thread is inside `generate`, and the images it was given."""
        state: tuple[bool, _Looked | None] = getattr(self._running, "state", (False, None))
        return state

    def _pruned_forward(self, *args: Any, **kwargs: Any) -> Any:
        call = calls.by_name(self._forward, args, kwargs)
        inside, looked = self._state()
        cache, ids_Bq = call.get("past_key_values"), call.get("input_ids")
        if looked is not None:
            fresh = Prefix.of(cache) is None
            if fresh and ids_Bq is not None and bool((ids_Bq == self._family.placeholder).any()):
                return self._shortened(call, _repeated(looked, len(ids_Bq)))
        elif not inside:
            images = self._family.images(call)
            if images is not None and self._method is not None:
                calls.refuse(call)
                return self._shortened(call, self._look(self._method, ids_Bq, call.get("attention_mask"), images).spots)
            if images is not None:
                self.last_kept = [list(range(count)) for count in self._family.counts(images)]
            elif Prefix.of(cache) is None:
                self.last_kept, self.last_columns = [], None
        prefix = Prefix.of(cache)
        return self._forward(**call) if prefix is None else self._continued(call, prefix)

    # --- Images ------------------------------------------------------------------------------------------------------

    def _look(self, method: Method, ids_BL: Tensor | None, mask_BL: Tensor | None, images: Images) -> _Looked:
        """Choose tokens of each image, and find out where they go."""
        if ids_BL is None:
            raise BadInput("a pruned model needs input_ids beside images")
        found = self._family.find(ids_BL, images)
        texts = _texts(ids_BL, mask_BL, self._family.placeholder) if self._needs_text else [[]] * len(ids_BL)
        prompts = [texts[row] for row, _, _ in found]
        choices = choose(self._family, method, self._budget, images, self._seeds(images), prompts)
        self.last_kept = [choice.indices_k.tolist() for choice in choices]
        return _Looked([_spot(*where, choice) for where, choice in zip(found, choices, strict=True)], len(ids_BL))

    def _seeds(self, images: Images) -> list[int]:
        names = self._samples
        if not self._random:
            return [0] * len(images)
        if names is None:
            names = [name_of(self._family.pixels_of(images, number)) for number in range(len(images))]
        elif len(names) != len(images):
            raise BadInput(f"{len(names)} names of samples for {len(images)} images: one for each is needed")
        return seeds_of(self.seed, names)

    # --- Prompts -----------------------------------------------------------------------------------------------------

    def _shortened(self, call: dict[str, Any], spots: list[Spot]) -> Any:
        """Run the model on prompts with the kept tokens only."""
        cache, ids_BL, mask_BL = call.get("past_key_values"), call["input_ids"], call.get("attention_mask")
        if mask_BL is not None and mask_BL.ndim != 2:
            raise BadInput(f"a pruned model needs a mask of two dimensions, not of shape {list(mask_BL.shape)}")
        if isinstance(call.get("logits_to_keep"), Tensor):
            raise BadInput("a pruned model needs logits_to_keep as a number: columns are others after pruning")
        before_BS, positions_PBL, mask_BL = self._placed(call, cache, ids_BL, mask_BL)
        spliced = splice(mask_BL, positions_PBL, spots, self._positions)
        whole_BS = spliced.mask_BS if before_BS is None else torch.cat([before_BS, spliced.mask_BS], 1)
        prefix = Prefix(whole_BS, spliced.next_B, bool(whole_BS.all()))
        self.last_columns = spliced.columns_BS
        call = self._rewritten(call, spliced)
        call["attention_mask"] = None if prefix.full else whole_BS
        output = self._forward(**call)
        if getattr(output, "past_key_values", None) is not None:
            prefix.remember(output.past_key_values)
        if hasattr(output, "image_hidden_states"):
            output.image_hidden_states = spliced.features_XD
        return output

    def _placed(
        self, call: Mapping[str, Any], cache: Any, ids_BL: Tensor, mask_BL: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Mask of what is in the cache already, positions of the new columns if none were left out, and their mask."""
        batch, length = ids_BL.shape
        prefix = Prefix.of(cache)
        if prefix is not None:
            mask_BS, positions_Bt = prefix.since(cache, mask_BL, length, batch)
            return mask_BS[:, :-length], positions_Bt[None, :, -length:], mask_BS[:, -length:]
        past = 0 if cache is None else cache.get_seq_length()
        if mask_BL is None:
            mask_BL = ids_BL.new_ones(batch, past + length)
        positions_PBL = self._family.positions(call, mask_BL, past)
        return (mask_BL[:, :past] if past else None), positions_PBL, mask_BL[:, past:]

    def _rewritten(self, call: Mapping[str, Any], spliced: Spliced) -> dict[str, Any]:
        """The arguments of the shortened call, but for the mask."""
        ids_BS = spliced.gather(call["input_ids"], self._family.padding)
        embeds_BSD = self.model.get_input_embeddings()(ids_BS)
        features_XD = spliced.features_XD.to(embeds_BSD.device, embeds_BSD.dtype)
        where_BSD = spliced.image_BS.to(embeds_BSD.device)[..., None].expand_as(embeds_BSD)
        rewritten = {
            **{name: value for name, value in call.items() if name not in self._family.vision_inputs},
            "input_ids": None,
            "inputs_embeds": embeds_BSD.masked_scatter(where_BSD, features_XD),
            "position_ids": self._family.position_ids(spliced.positions_PBS),
        }
        if call.get("labels") is not None:
            rewritten["labels"] = spliced.gather(call["labels"], -100)
        return rewritten

    def _continued(self, call: dict[str, Any], prefix: Prefix) -> Any:
        """Run the model on what follows pruned prompts."""
        new = next((call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None), None)
        if new is None:
            raise BadInput("a pruned model needs input_ids or inputs_embeds")
        batch, length = new.shape[:2]
        mask_BL = call.get("attention_mask")
        mask_BS, positions_Bt = prefix.since(call["past_key_values"], mask_BL, length, batch)
        full = prefix.full and (mask_BL is None or bool(mask_BS.all()))
        positions_1Bq = positions_Bt[None, :, -length:]
        return self._forward(
            **{
                **{name: value for name, value in call.items() if name not in self._family.vision_inputs},
                "attention_mask": None if full else mask_BS,
                "position_ids": self._family.position_ids(positions_1Bq),
            }
        )


def _texts(ids_BL: Tensor, mask_BL: Tensor | None, placeholder: int) -> list[list[int]]:
    """Token ids of each prompt, without placeholders and padding."""
    real_BL = ids_BL != placeholder
    if mask_BL is not None:
        real_BL &= mask_BL[:, -ids_BL.shape[1] :].to(real_BL.device).bool()
    return [ids_L[real_L].tolist() for ids_L, real_L in zip(ids_BL, real_BL, strict=True)]


def _spot(row: int, start: int, length: int, choice: Choice) -> Spot:
    return Spot(row, start, length, choice.indices_k, choice.features_kD)


def _repeated(looked: _Looked, rows: int) -> list[Spot]:
    """The spots of prompts that were repeated, each as often as the others, for beams or several answers."""
    if rows % looked.rows:
        raise BadInput(f"{rows} prompts reached the model, which is no multiple of the {looked.rows} that were given")
    copies = rows // looked.rows
    return [
        Spot(spot.row * copies + copy, spot.start, spot.length, spot.places_k, spot.features_kD)
        for spot in looked.spots
        for copy in range(copies)
    ]
