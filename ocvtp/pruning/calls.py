"""Arguments of `generate` and `forward`: by name, and which of them a pruned model has to refuse."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ocvtp.errors import BadInput

_ROLLED_BACK = "takes guesses back out of the cache by the length of whole prompts, which is not its own: leave it out"
_STATIC = (
    "a static one is laid out for whole prompts, and compiled: leave it out, or say 'dynamic' or 'offloaded' "
    "(`model.compile()` works with these)"
)
_REFUSED = {
    "assistant_model": f"assisted decoding {_ROLLED_BACK}",
    "prompt_lookup_num_tokens": f"prompt lookup {_ROLLED_BACK}",
    "prefill_chunk_size": "an image cannot be chosen from in chunks: leave it out, for pruned prompts are short",
    "mm_encoder_outputs": "give pixel_values instead, for the tower is read while it runs; so a pruned model drafts "
    "for no other one, which would hand it such outputs: let the model that answers be the pruned one, without a draft",
    "pixel_values_videos": "videos of this family are not pruned; those of Qwen2.5-VL, Qwen3-VL and OneVision are",
    "shift_labels": "give labels, which are cut like the prompts",
    "vision_feature_layer": "the pruner was made for the layer that the model's own configuration names",
    "vision_feature_select_strategy": "the pruner was made for the strategy that the model's own configuration names",
    "inputs_embeds": "give input_ids, for image tokens cannot be found in embeddings",
}
_DYNAMIC = (None, "dynamic", "offloaded")


class Uncopied:
    """What lies on a pruned model: a copy would go on to prune the model that it was copied from."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """`BadInput`: `copy`, `pickle` and `torch.save` come here."""
        raise BadInput(
            "a pruned model can neither be copied nor be saved as a whole: call remove() on its handle first, or save "
            "its state_dict()"
        )


class Replacement(Uncopied):
    """Stands in for a method of one model, under the signature of what it replaces."""

    def __init__(self, plain: Callable[..., Any], ours: Callable[..., Any]) -> None:
        functools.update_wrapper(
            self, plain
        )  # first, for it copies attributes too: what is wrapped may be one of these
        self.plain, self._ours = plain, ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what was put in place."""
        return self._ours(*args, **kwargs)

    def give_way(self) -> None:
        """From now on run what was replaced."""
        self._ours = self.plain


class Replaced:
    """Methods of one object that were replaced on it, and on nothing else."""

    def __init__(self, owner: Any, ours: Mapping[str, Callable[..., Any]]) -> None:
        """`ours`: what is called instead of each method, with the method before the caller's arguments."""
        self._owner = owner
        self._before = {name: owner.__dict__[name] for name in ours if name in owner.__dict__}
        self._made = {}
        for name, called in ours.items():
            plain = getattr(owner, name)
            self._made[name] = Replacement(plain, functools.partial(called, plain))
            setattr(owner, name, self._made[name])

    def undo(self) -> None:
        """Put things back. What somebody has laid over a replacement since then stays, and finds the original."""
        for name, made in self._made.items():
            made.give_way()
            if self._owner.__dict__.get(name) is made:
                del self._owner.__dict__[name]
                if name in self._before:
                    setattr(self._owner, name, self._before[name])


def by_name(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; None is as good as left out, for pictures and prompts at least."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(plain)
    found = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def refuse_hidden(call: Mapping[str, Any], taken: Collection[str], stands_for: Callable[[Any], Any]) -> None:
    """`BadInput` for images that come in another way than as pixels, which nobody would prune.

    Args:
        call: arguments of `generate` or `forward`.
        taken: those that the family understands.
        stands_for: where ids stand for vision tokens.
    """
    hidden = [n for n in ("mm_encoder_outputs", "pixel_values_videos") if call.get(n) is not None and n not in taken]
    ids = call.get("input_ids")
    if call.get("inputs_embeds") is not None and ids is not None and bool(stands_for(ids).any()):
        hidden.append("inputs_embeds")
    if hidden:
        raise BadInput(f"a pruned model cannot take {hidden[0]}: {_REFUSED[hidden[0]]}")


def refuse(call: Mapping[str, Any], taken: Collection[str], config: Any = None) -> None:
    """`BadInput` for arguments that a pruned model cannot honour.

    Args:
        call: arguments of `generate` or `forward` that come with images.
        taken: those that the family understands.
        config: the model's generation config, for `generate`.
    """
    given = call.get("generation_config")

    def asked(name: str) -> Any:
        for source in (call.get(name), getattr(given, name, None), getattr(config, name, None)):
            if source is not None:
                return source
        return None

    for name, why in _REFUSED.items():
        if name not in taken and asked(name) is not None:
            raise BadInput(f"a pruned model cannot take {name}: {why}")
    if asked("cache_implementation") not in _DYNAMIC:
        raise BadInput(
            f"a pruned model needs a dynamic cache, not cache_implementation={asked('cache_implementation')!r}: "
            + _STATIC
        )
    cache = call.get("past_key_values")
    if getattr(cache, "is_compileable", False):
        raise BadInput(f"a pruned model needs a dynamic cache, not a {type(cache).__name__}: {_STATIC}")


def later_turn(call: Mapping[str, Any], covered: int, column_inputs: Collection[str]) -> dict[str, Any]:
    """Of a call of `generate` that goes on from a cache, the arguments with the new columns alone.

    As transformers has it, ids are those of the whole conversation, or, beside a mask of all of it, the new ones.

    Args:
        call: its arguments.
        covered: columns that the cache stands for.
        column_inputs: names of arguments with an entry a column.

    Raises:
        BadInput: a draft for another model, embeddings, or no new column.
    """
    if getattr(call.get("generation_config"), "is_assistant", False):
        raise BadInput(
            "generate cannot go on from a cache of pruned prompts as a draft for another model: let the model that "
            "answers be the pruned one, without a draft"
        )
    ids_BL = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
    if ids_BL is None or call.get("inputs_embeds") is not None:
        raise BadInput("a pruned model goes on from a cache by input_ids alone: give the ids of the whole conversation")
    mask_BL = call.get("attention_mask")
    length = ids_BL.shape[1] if mask_BL is None else mask_BL.shape[1]
    new = length - covered
    if not 0 < new <= ids_BL.shape[1]:
        raise BadInput(
            f"the cache stands for {covered} columns, but the conversation has {length}, and {ids_BL.shape[1]} are "
            "given: give the ids of all of it, the answer so far and what is said next"
        )
    columns = {name: call[name][:, -new:] for name in column_inputs if call.get(name) is not None}
    rest = {name: value for name, value in call.items() if name != "inputs"}
    return {**rest, "input_ids": ids_BL[:, -new:], **columns}
