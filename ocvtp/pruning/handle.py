"""Pruning on one model: `generate` and `forward` are replaced on the instance, nothing else is touched.

The caller goes on to speak of whole prompts. `generate` encodes the images once and then runs as it is, on the
caller's own ids, mask and positions. `forward` shortens prompts that have images (`ocvtp.pruning.forward`). Returned
sequences, streamers and stopping criteria therefore see whole prompts; `logits` of a prompt are those of its shortened
form (`Handle.last_columns` says of which columns).

Letters: B prompts, L columns of the caller's prompts, S columns of the shortened ones, q new columns.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch import Tensor

from ocvtp.errors import BadInput
from ocvtp.methods import Budget, Entry, Keep, Method, entry_of, options_of
from ocvtp.methods.budget import Entering
from ocvtp.methods.inside import Inside
from ocvtp.pruner.seeding import derive
from ocvtp.pruning import calls
from ocvtp.pruning.choosing import choose, name_of, slots
from ocvtp.pruning.features import Embedded, before_the_llm, call_of, embedded, texts_of
from ocvtp.pruning.forward import EncodedCall, Forward
from ocvtp.pruning.prefix import Prefix
from ocvtp.pruning.splice import Positions, Spot
from ocvtp.pruning.videos import VideoBudget
from ocvtp.vlms.families import family_of
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Images
from ocvtp.vlms.memory import Remembering, VisionMemory

if TYPE_CHECKING:  # so that an option of one method is in the keys of no other's results
    from ocvtp.pruning.options import Options


def prune(
    model: Any,
    method: str | Method = "qr",
    keep: Keep | None = None,
    pruner: Any = None,
    *,
    video_keep: Keep | None = None,
    video_group: int = 1,
    seed: int = 0,
    positions: Positions | None = None,
    **options: "Unpack[Options]",
) -> "Handle":
    """Prune the vision tokens of a model from now on, in place.

    Args:
        model: a supported model of transformers (`ocvtp.vlms.families.FAMILIES`), on any device.
        method: a name that `ocvtp methods` lists; two, one before the LLM and one inside it, as "visionzip+fastv"
            (`ocvtp.methods.combined`); or a `Method` of your own (docs/your-own-method.md). By default pivoted
            QR of what the LLM is fed from, which needs no training (docs/findings.md says why it is the default).
        keep: tokens an image (int), a share of them in (0, 1], or a percentage such as "11.1%". Only `vanilla` needs
            none.
        pruner: for `oc-vtp`: an `OCPruner`, a folder, or an id on the hub.
        video_keep: of videos, if other than `keep` of each frame: a budget "16/frame", "128/video" or "32/second".
        video_group: frames of a video that the method sees at a time, as one image: 2 for pairs of frames. A frame of
            Qwen-VL is a pair already.
        seed: of methods with randomness. What is kept of an image depends on it and on the image alone.
        positions: `compact` numbers the shortened prompt anew, `original` leaves each token its position; None: as the
            method has it; with M-RoPE (Qwen2.5-VL) `original`, and always so inside the LLM.
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
    if positions not in ("compact", "original", None):
        raise BadInput(f"positions is {positions!r}: compact or original is needed")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BadInput(f"seed is {seed!r}: a whole number is needed")
    if keep is None and entry.acts != "nowhere":
        raise BadInput(f"{entry.name} needs keep: tokens an image, or a share of them")
    budget = Budget.parse(1.0 if keep is None else keep)
    if family.facts.tokens is not None:
        budget.tokens(family.facts.tokens)
    built = entry.build(family, pruner, options_of(entry, options))
    if built is not None and not built.name:
        built.name = entry.name
    if isinstance(built, Inside) and family.facts.tokens is not None:
        keep_tokens = budget.tokens(family.facts.tokens)
        built.planned(built.enter(family.facts.tokens, keep_tokens), keep_tokens)
    videos = VideoBudget.parse(budget if video_keep is None else video_keep, video_group)
    asked = {"video_keep": (video_keep, None), "video_group": (video_group, 1)}
    for name, value in ((name, value) for name, (value, default) in asked.items() if value != default):
        if "pixel_values_videos" not in family.vision_inputs:
            raise BadInput(f"{name} is {value!r}, but videos of this family are not pruned: leave it out")
        if isinstance(built, Inside):
            raise BadInput(f"{name} is {value!r}, but {entry.name} drops tokens inside the LLM by keep alone")
    if video_group > 1 and built is not None and type(built).encode is not Method.encode:
        raise BadInput(f"video_group is {video_group}, but {entry.name} runs the tower itself, frame by frame")
    return Handle(model, entry, family, built, budget, seed, positions, videos)


class Handle(calls.Uncopied):
    """Pruning on one model.

    Attributes:
        model: the model.
        method: name of the method.
        keep: the budget as it was given.
        seed: of the run.
        last_kept: for each image of the last call, and behind them for each frame of its videos, the numbers of the
            tokens that stayed, ascending.
        last_layers: for each layer of the language model, the tokens of each of these images that it read. They are
            fewer in later layers if the method acts inside the LLM, and may then contain merged tokens.
        last_columns: [B, S]: the caller's column that each column of the last shortened prompts, and so of their
            logits, comes from; -1 for padding. None if they were not shortened.
    """

    def __init__(
        self, model: Any, entry: Entry, family: Family, method: Method | None, budget: Budget, seed: int,
        positions: Positions | None, videos: VideoBudget | None = None,
    ) -> None:  # fmt: skip
        self.model, self.method, self.keep, self.seed = model, entry.name, budget.written, seed
        self.last_kept: list[list[int]] = []
        self.last_layers: list[list[int]] = []
        self.last_columns: Tensor | None = None
        self._family, self._method = family, method
        # A method inside the LLM chooses there: before it everything stays, or what it lets enter.
        if isinstance(method, Inside):
            self._budget: Budget = Entering(budget.written, budget.count, budget.share, method.enter)
        else:
            self._budget = budget
        self._videos = VideoBudget(self._budget) if isinstance(method, Inside) or videos is None else videos
        self._depth: int = model.get_decoder().config.num_hidden_layers
        self._samples: list[str] | None = None
        self._random, self._needs_text = entry.random, entry.needs_text
        self._running = threading.local()
        self._generate, self._forward = model.generate, model.forward
        self._prompts = Forward(model, family, model.forward, method, budget, positions, entry.positions)
        self._replaced = calls.Replaced(model, {"generate": self._pruned_generate, "forward": self._pruned_forward})
        model._ocvtp_handle = self

    @property
    def _active(self) -> bool:
        return self.model.__dict__.get("_ocvtp_handle") is self

    def remove(self) -> None:
        """Give the model back as it was. A second call does nothing.

        What was laid over `forward` or `generate` in the meantime, such as accelerate's hooks, stays there.
        """
        if not self._active:
            return
        del self.model.__dict__["_ocvtp_handle"]
        self._replaced.undo()
        self._prompts.remove()

    def __enter__(self) -> "Handle":
        if not self._active:
            raise BadInput("this handle was removed: nothing would be pruned in here; call ocvtp.prune again")
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

    def share(self, memory: VisionMemory) -> None:
        """Take what the tower makes of a batch from a memory, which handles on one model share one after another."""
        self._family = cast(Family, Remembering(self._family, memory))

    @torch.no_grad()
    def embed(self, images: Any, prompts: Sequence[Any] | Tensor | None = None) -> list[Embedded]:
        """What the language model would read of each image: for engines that take vision tokens instead of pixels.

        Args:
            images: what the model's processor made of them, such as all that it returns for images and text, or
                `pixel_values` alone where nothing else describes images.
            prompts: for each image token ids of its prompt, for methods that read it; None: `input_ids` in `images`.

        Returns:
            For each image its rows, on the model's device, what they are, and their positions.

        Raises:
            BadInput: a method that prunes nothing or acts inside the LLM, videos, images that are none or of
                another shape or type than the processor makes, prompts that are no token ids, or no prompts for a
                method that reads them.
        """
        method, call = before_the_llm(self.method, self._method), call_of(images, self._family)
        given = self._family.images(call)
        assert given is not None  # noqa: S101 - `call_of` has found some
        if prompts is not None:
            texts = texts_of(prompts, len(given), self._family)
        elif self._needs_text and call.get("input_ids") is None:
            raise BadInput(f"{self.method} reads the prompt: give prompts, or input_ids beside pixel_values in images")
        else:
            texts = self._prompts_of(call.get("input_ids"), call.get("attention_mask"), given)
        placed = choose(self._family, method, self._budget, given, self._seeds(given), texts, self._videos)
        return embedded(self._family, given, placed, self._prompts.positions)

    def slots(self, **call: Any) -> list[Tensor | None]:
        """Attention of the slots that choose tokens of each image, [K, N], given the arguments of a `generate`.

        None for images that keep all tokens, and for methods without slots.
        """
        images = self._family.images(call)
        if images is None or self._method is None:
            return [None] * (0 if images is None else len(images))
        with torch.no_grad():
            prompts = self._prompts_of(call.get("input_ids"), call.get("attention_mask"), images)
            return slots(self._family, self._method, self._budget, images, self._seeds(images), prompts, self._videos)

    # --- In place of the model's own -----------------------------------------------------------------------------

    def _pruned_generate(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        call = calls.by_name(plain, args, kwargs)
        family, cache = self._family, call.get("past_key_values")
        given, covered, new = call, Prefix.covered(cache), 0
        pictures = any(call.get(name) is not None for name in family.vision_inputs)
        if covered and (pictures or Prefix.of(cache) is not None):
            given = calls.later_turn(call, covered, family.column_inputs)
            new = given["input_ids"].shape[1]
        images = family.images(given)
        if self._method is not None:
            calls.refuse_hidden(call, family.vision_inputs, family.stands_for)
        if images is None or self._method is None:
            self._keep_all(images)
            return self._run_generate(_Generating(covered, new), call)
        calls.refuse(call, family.vision_inputs, self.model.generation_config)
        self._prompts.check(call, family.counts(images))
        ids_BL = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        with torch.no_grad():
            encoded = self._encode(self._method, ids_BL, call.get("attention_mask"), images)
        if covered:  # positions follow from what the cache stands for, not from ids of the whole conversation
            mine = {*family.position_inputs, *family.column_inputs}
            more = {name: given[name] for name in mine if given.get(name) is not None}
            dropped = {*family.vision_inputs, *family.column_inputs, "position_ids"}
        else:
            more, dropped = {}, {*family.vision_inputs} - family.position_inputs
        kept = {name: value for name, value in call.items() if name not in dropped}
        return self._run_generate(_Generating(covered, new, encoded, more), kept)

    def _run_generate(self, generating: "_Generating", call: dict[str, Any]) -> Any:
        before = self._generating
        self._running.generating = generating
        try:
            return self._generate(**call)
        finally:
            self._running.generating = before

    @property
    def _generating(self) -> "_Generating | None":
        """The `generate` that this thread is in."""
        found: _Generating | None = getattr(self._running, "generating", None)
        return found

    def _pruned_forward(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        call = calls.by_name(plain, args, kwargs)
        cache, generating = call.get("past_key_values"), self._generating
        prefix = Prefix.of(cache)
        if generating is not None:
            begins = Prefix.covered(cache) == generating.covered
            if generating.covered and begins and prefix is not None:  # of which transformers thinks that it is shorter
                call["input_ids"] = call["input_ids"][:, -generating.new :]
            if generating.covered and prefix is not None:
                call["position_ids"] = None
            if generating.encoded is not None and begins:
                call |= generating.given
                if generating.covered and prefix is None:
                    call["position_ids"] = self._prompts.spread(call)
                return self._shortened(call, generating.encoded, len(call["input_ids"]))
        else:
            if self._method is not None:
                calls.refuse_hidden(call, self._family.vision_inputs, self._family.stands_for)
            images = self._family.images(call)
            if images is not None and self._method is not None:
                calls.refuse(call, self._family.vision_inputs)
                self._prompts.check(call, self._family.counts(images))
                encoded = self._encode(self._method, call.get("input_ids"), call.get("attention_mask"), images)
                return self._shortened(call, encoded, encoded.rows)
            if images is not None or prefix is None:
                self._keep_all(images)
        return self._forward(**call) if prefix is None else self._prompts.continued(call, prefix)

    # --- Images ------------------------------------------------------------------------------------------------------

    def _encode(self, method: Method, ids_BL: Tensor | None, mask_BL: Tensor | None, images: Images) -> EncodedCall:
        """Choose tokens of each image, and find out where they go."""
        if ids_BL is None:
            raise BadInput("a pruned model needs input_ids beside images")
        self._prompts.check_images(images)
        found = self._family.find(ids_BL, images)
        prompts = self._prompts_of(ids_BL, mask_BL, images)
        placed = choose(self._family, method, self._budget, images, self._seeds(images), prompts, self._videos)
        self.last_kept = [each.kept for each in placed]
        self.last_layers = [[len(each.places_X) for each in placed] for _ in range(self._depth)]
        spots = [
            Spot(
                **vars(each),
                row=row,
                start=start,
                length=length,
                kind="image" if number < images.stills else "video",
                tokens=count,
            )
            for number, ((row, start, length), each, count) in enumerate(
                zip(found, placed, self._family.counts(images), strict=True)
            )
        ]
        return EncodedCall(spots, *ids_BL.shape)

    def _prompts_of(self, ids_BL: Tensor | None, mask_BL: Tensor | None, images: Images) -> list[list[int]]:
        """Token ids of the prompt that each image stands in, if the method reads them."""
        if ids_BL is None or not self._needs_text:
            return [[]] * len(images)
        texts = _texts(ids_BL, mask_BL, ~self._family.stands_for(ids_BL))
        return [texts[row] for row, _, _ in self._family.find(ids_BL, images)]

    def _shortened(self, call: dict[str, Any], encoded: EncodedCall, rows: int) -> Any:
        """Run the model on prompts with fewer tokens, and note what came of them."""
        output, told = self._prompts.shortened(call, encoded, rows)
        self.last_columns = told.columns_BS
        if told.kept is not None and told.layers is not None:
            self.last_kept, self.last_layers = told.kept, told.layers
        return output

    def _keep_all(self, images: Images | None) -> None:
        """Nothing is dropped in this call."""
        counts = [] if images is None else self._family.counts(images)
        self.last_kept = [list(range(count)) for count in counts]
        self.last_layers, self.last_columns = [counts for _ in range(self._depth)], None

    def _seeds(self, images: Images) -> list[int]:
        names = self._samples
        if not self._random:
            return [0] * len(images)
        if names is None:
            names = [name_of(self._family.pixels_of(images, number)) for number in range(len(images))]
        elif len(names) != len(images):
            raise BadInput(f"{len(names)} names of samples for {len(images)} images: one for each is needed")
        return [derive(self.seed, name) for name in names]  # not from batch, order or machine


@dataclass(frozen=True)
class _Generating:
    """A `generate` that runs.

    Attributes:
        covered: columns of the caller that the cache stood for when it began; 0 without one.
        new: columns that come next, where the cache stands for some.
        encoded: the images that it was given.
        given: what a later turn says of its new columns and images.
    """

    covered: int
    new: int = 0
    encoded: EncodedCall | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


def _texts(ids_BL: Tensor, mask_BL: Tensor | None, real_BL: Tensor) -> list[list[int]]:
    """Token ids of each prompt, without what is not real and without padding."""
    if mask_BL is not None:
        real_BL = real_BL & mask_BL[:, -ids_BL.shape[1] :].to(real_BL.device).bool()
    return [ids_L[real_L].tolist() for ids_L, real_L in zip(ids_BL, real_BL, strict=True)]
