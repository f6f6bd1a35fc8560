"""Between the layers of the language model: prompts grow shorter, and each layer reads masks and positions of its own.

Hooks lie on the layers of one model and do nothing unless a call of the same thread asks for it (`Layers.running`).
The model's own code runs each layer; a hook hands it fewer hidden states, and the mask and the rotary positions that
belong to them, made by the model's own functions for its own attention.

The cache then holds fewer columns in later layers. What each of them holds is remembered beside the cache (`Prefix`),
and each new token gets, in every such group of layers, the mask and the position that fit (`Decoding`).

Letters: B prompts, S columns, q new columns, I images, P rows of positions (1, or 3 for M-RoPE), D width of the LLM.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods.inside import Inside, PruneStage, Step, counts
from ocvtp.pruning import calls
from ocvtp.pruning.attention import Read, readable
from ocvtp.pruning.prefix import Held, Prefix
from ocvtp.pruning.prompts import Prompts
from ocvtp.pruning.scoring import later, scored
from ocvtp.pruning.splice import Positions


@dataclass(frozen=True)
class Inputs:
    """What layers read from some layer on.

    Attributes:
        mask_BS: of what is in the cache and of the new columns.
        full: there is no padding.
        positions_PBq: of the new columns.
    """

    mask_BS: Tensor
    full: bool
    positions_PBq: Tensor


class Run(ABC):
    """One call of the language model."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._changed: dict[str, Any] = {}

    @abstractmethod
    def before(self, index: int, layer: Any, states_BqD: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Hidden states that a layer reads, in place of those that it would; `_read` says what else it reads."""

    def hook(self, index: int, layer: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        """In the shape that PyTorch wants."""
        states_BqD = self.before(index, layer, args[0] if args else call["hidden_states"], call)
        call = {**call, **self._changed}
        if args:
            return (states_BqD, *args[1:]), call
        return args, {**call, "hidden_states": states_BqD}

    def _read(self, inputs: Inputs, index: int, states_BqD: Tensor, cache: Any) -> None:
        """Make mask and rotary positions for the layers from this one on."""
        from transformers.masking_utils import create_causal_mask

        config = self._decoder.config
        three = several_positions(config)
        positions = inputs.positions_PBq.expand(3, -1, -1) if three else inputs.positions_PBq[0]
        self._changed = {
            "attention_mask": create_causal_mask(
                config=config,
                inputs_embeds=states_BqD,
                attention_mask=None if inputs.full else inputs.mask_BS,
                past_key_values=cache,
                layer_idx=index,
            ),
            "position_embeddings": self._decoder.rotary_emb(states_BqD, positions),
            # Layers only use them to find out whether a row holds several prompts, which none does.
            "position_ids": None,
        }


class Decoding(Run):
    """What follows prompts that were shortened between layers."""

    def __init__(self, decoder: Any, starts: Mapping[int, Inputs]) -> None:
        """`starts`: what is read from each layer on that holds less than the one before."""
        super().__init__(decoder)
        self._starts = starts

    def before(self, index: int, layer: Any, states_BqD: Tensor, call: Mapping[str, Any]) -> Tensor:  # noqa: D102
        if index in self._starts:
            self._read(self._starts[index], index, states_BqD, call.get("past_key_values"))
        return states_BqD


class Shortening(Run):
    """Prompts that grow shorter."""

    def __init__(
        self,
        decoder: Any,
        method: Inside,
        prompts: Prompts,
        steps: Sequence[Sequence[Step]],
        mode: Positions,
        *,
        texts: Sequence[Sequence[int]],
        keeps: Sequence[int],
        tower_IN: Tensor | None,
        next_B: Tensor,
        before_BS: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        """A call that has not begun.

        Args:
            decoder: the language model.
            method: which tokens go, and where.
            prompts: before the first layer.
            steps: of each image, one a stage.
            mode: how tokens that stay are numbered.
            texts: columns of the text after each image.
            keeps: budget of each image.
            tower_IN: numbers of the images' tokens that the method itself gave before the LLM.
            next_B: position of the next token in the first layer.
            before_BS: mask of the cache as the first layer has it; None if it is empty.
            prefix: of the cache.
        """
        super().__init__(decoder)
        self.prompts, self.held = prompts, list[Held]()
        self._method, self._steps, self._mode, self._texts = method, steps, mode, texts
        self._keeps, self._tower_IN = keeps, tower_IN
        self._next_B, self._before_BS, self._prefix = next_B, before_BS, prefix
        self._lengths, self._whole_spans = prompts.lengths, prompts.spans
        self._full = before_BS is None or bool(before_BS.all())
        self._starts = {held.first for held in prefix.later} if prefix is not None else set()
        self._scores_IN: Tensor | None = None
        self._asks_keys_IR: Tensor | None = None
        self._idle = all(len(set(layers)) == 1 for layers in self.counts())
        """Nothing is dropped or merged anywhere."""

    def before(self, index: int, layer: Any, states_BqD: Tensor, call: Mapping[str, Any]) -> Tensor:  # noqa: D102
        cache = call.get("past_key_values")
        if index == 0 and self._method.reads_text and not self._idle:
            self._find_raters(states_BqD)
        was = self.prompts
        for number, stage in self._stages(pruned=index):
            if stage.scored < index and self._drops(number):
                states_BqD = self._shorten(number, states_BqD)
        if self.prompts is not was or index in self._starts:
            self._enter(index, states_BqD, cache)
        for number, stage in self._stages(scored=index):
            if not self._drops(number):
                continue
            self._score(layer, index, states_BqD, {**call, **self._changed}, cache, number)
            if stage.pruned == index:
                was, states_BqD = self.prompts, self._shorten(number, states_BqD)
                if self.prompts is not was:
                    self._enter(index, states_BqD, cache)
        return states_BqD

    def counts(self) -> list[list[int]]:
        """Tokens of each image that each layer reads."""
        spans, method = self._whole_spans, self._method
        return [
            counts(method.depth, span.count, method.stages, steps)
            for span, steps in zip(spans, self._steps, strict=True)
        ]

    def _stages(self, **wanted: int) -> list[tuple[int, PruneStage]]:
        numbered = enumerate(self._method.stages)
        return [(i, stage) for i, stage in numbered if all(getattr(stage, n) == v for n, v in wanted.items())]

    def _drops(self, number: int) -> bool:
        """Whether a stage changes any image. It must be asked before the stage, when prompts are as it finds them."""
        return not self.prompts.stay([image[number] for image in self._steps])

    def _find_raters(self, embeds_BqD: Tensor) -> None:
        found = []
        with torch.no_grad():
            for span, text in zip(self.prompts.spans, self._texts, strict=True):
                row_qD = embeds_BqD[span.row]
                found.append(self._method.raters(row_qD[span.start : span.start + span.count], row_qD[list(text)]))
        self.prompts = self.prompts.asked_by(found, self._texts)

    def _score(
        self, layer: Any, index: int, states_BqD: Tensor, call: Mapping[str, Any], cache: Any, number: int
    ) -> None:
        past = cache.layers[index].keys if cache is not None and cache.get_seq_length(index) else None
        read, method = Read(states_BqD, call["position_embeddings"], self._whole(index), past), self._method
        told = scored(layer, read, self.prompts, number, self._tower_IN)
        self._scores_IN = self.prompts.guarded(method.score(told))
        if method.reads_later:
            self._asks_keys_IR = told.keys()[1]
        if method.adapts_at == number:
            # The one place where numbers of tokens wait for the device.
            self._steps = [
                method.adapted(span.count, keep, information)
                for span, keep, information in zip(
                    self._whole_spans, self._keeps, method.information(told).tolist(), strict=True
                )
            ]

    def _shorten(self, number: int, states_BqD: Tensor) -> Tensor:
        assert self._scores_IN is not None  # noqa: S101 - no stage prunes before it has scored
        steps = [image[number] for image in self._steps]
        scores_IN = self._scores_IN
        if self._asks_keys_IR is not None:
            asking = [max(1, len(text)) for text in self._texts]
            kept = [step.kept for step in steps]
            now = later(self._decoder.norm, states_BqD, self.prompts, self._asks_keys_IR, asking, kept)
            scores_IN = self.prompts.guarded(self._method.rank(scores_IN, now))
        self.prompts, states_BqD = self.prompts.shorter(states_BqD, scores_IN, steps, self._method.merge, self._mode)
        return states_BqD

    def _enter(self, index: int, states_BqD: Tensor, cache: Any) -> None:
        """From this layer on other columns are read, or others are in the cache."""
        shift_B = torch.zeros_like(self._next_B) if self._prefix is None else self._prefix.shift(index)
        full = self.prompts.full and (
            self._full if self._prefix is None else self._prefix.at(index).full and self._full
        )
        inputs = Inputs(self._whole(index), full, self.prompts.positions_PBS + shift_B[:, None])
        self._read(inputs, index, states_BqD, cache)
        next_B = self._next_B + shift_B
        if self._mode == "compact":
            gone = [old - new for old, new in zip(self._lengths, self.prompts.lengths, strict=True)]
            next_B = next_B - torch.tensor(gone, device=next_B.device)
        self.held = [*(held for held in self.held if held.first < index), Held(index, inputs.mask_BS, next_B, full)]

    def _whole(self, index: int) -> Tensor:
        """Mask of what is in the cache at a layer and of the new columns."""
        if self._before_BS is None:
            return self.prompts.mask_BS
        before_BS = self._before_BS if self._prefix is None else self._prefix.whole(index, self._before_BS)
        return torch.cat([before_BS, self.prompts.mask_BS], 1)


class Layers(calls.Uncopied):
    """The hooks on one model."""

    def __init__(self, model: Any, method: Inside, added: int) -> None:
        """Put them on.

        Args:
            model: with a language model.
            method: which tokens go, and where.
            added: the model adds vision features by the column to what so many of the first layers make.

        Raises:
            Incompatible: a language model whose attention cannot be computed from outside, or that adds features to
                columns that are gone.
        """
        self.decoder = model.get_decoder()
        self._name = method.name
        first = min(stage.pruned for stage in method.stages)
        if first < added:
            raise Incompatible(
                f"{method.name} drops tokens before layer {first} (from 0), but this model adds features of its vision "
                f"tower (DeepStack) to the first {added} layers: have it begin at layer {added} or later, or choose a "
                "method before the LLM"
            )
        for stage in method.stages if method.reads_attention else ():
            readable(self.decoder.layers[stage.scored], method.name)
        self._now = threading.local()
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._before, index), prepend=True, with_kwargs=True)
            for index, layer in enumerate(self.decoder.layers)
        ]

    def check(self, cache: Any) -> None:
        """`BadInput` where prompts cannot grow shorter between layers."""
        from transformers.cache_utils import QuantizedCache

        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self.decoder.layers):
            raise BadInput(
                f"{self._name} drops tokens between layers, which gradient checkpointing would run twice: call "
                "gradient_checkpointing_disable(), or choose a method before the LLM"
            )
        modules = (self.decoder, *self.decoder.layers)
        if any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in modules):
            raise BadInput(
                f"{self._name} drops tokens between layers, by hooks that a compiled language model runs otherwise: "
                "load it without compile(), or choose a method before the LLM"
            )
        if isinstance(cache, QuantizedCache):
            raise BadInput(
                f"{self._name} reads keys of earlier prompts, which a QuantizedCache does not hold as they are: give a "
                "DynamicCache, or choose a method before the LLM"
            )

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Let a run act on the language model, as long as this thread is in here."""
        before = getattr(self._now, "run", None)
        self._now.run = run
        try:
            yield
        finally:
            self._now.run = before

    def _before(self, index: int, layer: Any, args: tuple[Any, ...], call: dict[str, Any]) -> Any:
        run: Run | None = getattr(self._now, "run", None)
        return None if run is None else run.hook(index, layer, args, call)


def several_positions(config: Any) -> bool:
    """Positions of M-RoPE come in three rows, whether they differ or not."""
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})
