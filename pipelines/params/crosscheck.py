"""What is wrong between entries of params.yaml, or between them and what there is: methods, benchmarks, VLMs.

`pipelines.params.model` has checked each entry by itself; an entry that failed there holds its default here, so that
one mistake is not reported twice.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from cluster.validation import Problems, S, nearest, show, walk
from ocvtp.data.training_splits import TRAINED_ON
from ocvtp.errors import BadInput, OcvtpError
from ocvtp.evaluation.benchmarks import benchmarks
from ocvtp.methods import REGISTRY, entry_of
from ocvtp.vlms import CatalogEntry, resolve
from ocvtp.vlms.hidden_states import resolve_layer
from pipelines.params.ablate import AXES, ON, OPTIONS, TRAIN, Ablate, Change
from pipelines.params.fitting import lacking, slots_of, tokens_kept
from pipelines.params.model import SAMPLED, Params, SceneStyle, Train

log = logging.getLogger(__name__)
ALL = "all"


def read(model: type[S], data: object, problems: Problems, above: str = "") -> S:
    """Make a section of `data`. What is wrong goes to `problems`, and has its default in what comes back."""
    data = {} if data is None else copy.deepcopy(data)
    while True:
        try:
            return model.model_validate(data)
        except ValidationError as error:
            if data == {}:  # the defaults themselves
                raise
            problems.take(error, model, data, above)
            data = _without(error, data)


def _without(error: ValidationError, data: Any) -> Any:
    """The data less the entries that are wrong."""
    for one in error.errors():
        entries = [(level, key) for level, key in walk(one["loc"], data) if isinstance(level, dict)]
        if not entries:
            return {}
        level, key = entries[-1]
        del level[key]
    return data


def crosscheck(params: Params, problems: Problems) -> Params:
    """Note everything that does not fit; returns the params with `method: all` and `benchmark: all` spelt out."""
    named = params.method != (ALL,)
    spelt_out = {"method": _methods(params.method, problems), "benchmark": _benchmarks(params, problems)}
    params = params.model_copy(update={**spelt_out, "ablate": _new(params)})
    _options(params, problems)
    _trainings(params, problems)
    _sample(params, problems)
    _trained_on(params, problems)
    entries = _vlms(params.vlm, problems)
    params = _fitting(params, entries, problems, named=named)
    for entry in entries:
        _layers("layer", params.layer, entry, problems)
        _layers("ablate.layer", params.ablate.values("layer"), entry, problems)
        _budgets(params, entry, problems)
    return params


def _at(path: str, values: Sequence[object], index: int) -> str:
    """The path of one value of an axis: with its place where there are several."""
    return f"{path}[{index}]" if len(values) > 1 else path


def _names(path: str, values: Sequence[str], legal: Iterable[str], problems: Problems) -> None:
    names = list(legal)
    for index, value in enumerate(values):
        if value not in names:
            problems.add(_at(path, values, index), f"{show(value)} is not legal{nearest(value, names)}")


def _methods(methods: tuple[str, ...], problems: Problems) -> tuple[str, ...]:
    if methods == (ALL,):
        return tuple(REGISTRY)
    legal = [*REGISTRY, *([ALL] if len(methods) == 1 else [])]
    for index, name in enumerate(methods):
        if (pair := _pair(name)) is not None:
            problems.add(_at("method", methods, index), pair)
        elif name not in legal and name not in REGISTRY:
            problems.add(_at("method", methods, index), f"{show(name)} is not legal{nearest(name, legal)}")
    return methods


def _pair(name: str) -> str | None:
    """Why a pair of methods, `before+inside`, cannot be; None if it can, and for single methods."""
    try:
        if "+" in name:
            entry_of(name)
    except BadInput as error:
        return str(error)
    return None


def _fitting(params: Params, entries: Sequence[CatalogEntry], problems: Problems, *, named: bool) -> Params:
    """Methods that have no meaning on any of the VLMs: a problem where they are named, left out of `all`.

    One that has on some is run on those.
    """
    fitting = []
    for index, name in enumerate(params.method):
        reasons = [
            reason
            for entry in entries
            if name in REGISTRY and _pair(name) is None
            if (reason := lacking(REGISTRY[name], entry, params.evaluate.options.get(name, {})))
        ]
        if not reasons or len(reasons) < len(entries):
            fitting.append(name)
        elif named:
            problems.add(_at("method", params.method, index), f"{name} {reasons[0]}")
            fitting.append(name)
        else:
            log.warning("method: all is without %s, which %s", name, reasons[0])
    return params.model_copy(update={"method": tuple(fitting)})


def _benchmarks(params: Params, problems: Problems) -> tuple[str, ...]:
    if params.evaluate.data == "scenes" and params.sample.questions < 2:
        problems.add("sample.questions", "at least 2 are needed where evaluate.data is scenes (some come in pairs)")
    if params.benchmark == (ALL,):
        return tuple(benchmarks())
    legal = [*benchmarks(), *([ALL] if len(params.benchmark) == 1 else [])]
    _names("benchmark", params.benchmark, legal, problems)
    return params.benchmark


def _new(params: Params) -> Ablate:
    """What `ablate` changes without what the grid has already."""

    def there(change: Change) -> bool:
        path, value = change
        if path in AXES:
            return value in getattr(params, path)
        if path == ON:
            return value in params.train.on
        return path.startswith(TRAIN) and params.train.with_changes((change,)) == params.train.with_changes(())

    return params.ablate.only(lambda change: not there(change))


def _options(params: Params, problems: Problems) -> None:
    """Options of methods: those of all evaluations, and those to ablate."""
    for name, options in params.evaluate.options.items():
        for option in options:
            _option(f"evaluate.options.{name}.{option}", name, option, params, problems)
    changes = [change for changes in params.ablate.changes for change in changes]
    for path in dict.fromkeys(path for path, _ in changes if path.startswith(OPTIONS)):
        name, _, option = path.removeprefix(OPTIONS).partition(".")
        _option(f"ablate.{path}", name, option, params, problems)


def _option(path: str, method: str, option: str, params: Params, problems: Problems) -> None:
    if (pair := _pair(method)) is not None:
        problems.add(path, pair)
    elif method not in REGISTRY:
        problems.add(path, f"there is no method {method!r}{nearest(method, REGISTRY)}")
    elif option == "layer" and option in REGISTRY[method].options and not REGISTRY[method].trained:
        return  # in place of the axis, which is that of pruners
    elif option in AXES or option == "other_vlm":
        problems.add(path, f"{option} is no option to give here: it is an axis of params.yaml, or none of its affairs")
    elif option not in REGISTRY[method].options:
        problems.add(path, f"{method} has no option {option!r}{nearest(option, REGISTRY[method].options)}")
    elif path.startswith("ablate.") and method not in params.method:
        problems.add(path, f"{method} is not among the methods of the grid")


def _trainings(params: Params, problems: Problems) -> None:
    """What is ablated of the section `train`, by the library's own checks; and that trainings have what they need."""
    trainings = [params.train]
    for changes in params.ablate.changes:
        training = [change for change in changes if change[0].startswith(TRAIN)]
        if training:
            trainings.append(read(Train, params.train.with_changes(training), problems, f"ablate.{TRAIN[:-1]}"))
    if any(one.pruner.given.get("residual_of") == "handed_on" and not one.handed_on for one in trainings):
        problems.add("train.handed_on", "false, but train.pruner.residual_of is handed_on, which needs these tokens")


def _sample(params: Params, problems: Problems) -> None:
    sample = params.sample
    for name in ("annotations", "image_folder"):
        given = getattr(sample, name)
        if sample.source == "coco" and given is None:
            problems.add(f"sample.{name}", "null, but sample.source: coco needs the path")
        if sample.source == "scenes" and given is not None:
            problems.add(f"sample.{name}", f"{show(given)} is not read where sample.source is scenes: make it null")
    if sample.source == "coco" and not sample.questions and sample.style != SceneStyle():
        problems.add("sample.style", "it is of scenes, but there are none: sample.source is coco, sample.questions 0")


def _trained_on(params: Params, problems: Problems) -> None:
    """Benchmarks on whose own images pruners are trained: that there are such images, and questions to ask."""
    for where, name in _values(params, ON):
        if name == SAMPLED:
            continue
        if name not in TRAINED_ON:
            legal = [SAMPLED, *TRAINED_ON]
            none = ", which is for evaluation alone" if name in benchmarks() else ""
            problems.add(where, f"{show(name)} is not legal{none}{nearest(name, legal)}")
            continue
        if name not in params.benchmark:
            problems.add(
                where, f"{name} is not among the benchmarks of the grid, on which alone such a pruner is tried"
            )
        source, data = params.sample.source, params.evaluate.data
        if data != {"scenes": "scenes", "coco": "official"}[source]:
            problems.add(
                where, f"its training images are like those of sample.source: {source}, but evaluate.data is {data}"
            )
        elif source == "coco" and TRAINED_ON[name].training is None and name not in params.sample.training:
            problems.add(f"sample.training.{name}", f"is missing: {TRAINED_ON[name].hub} has no training split, so "
                         "annotations and image_folder of one are needed")  # fmt: skip
    for name in params.sample.training:
        if name not in TRAINED_ON:
            problems.add(f"sample.training.{name}", f"there is no such training split{nearest(name, TRAINED_ON)}")
        elif params.sample.source != "coco":
            problems.add(f"sample.training.{name}", "it is not read where sample.source is scenes")


def _vlms(names: Sequence[str], problems: Problems) -> list[CatalogEntry]:
    entries = []
    for index, name in enumerate(names):
        try:
            entries.append(resolve(name))
        except (OcvtpError, OSError, ValueError) as error:
            problems.add(_at("vlm", names, index), str(error))
    return entries


def _layers(where: str, layers: Sequence[int], entry: CatalogEntry, problems: Problems) -> None:
    seen: dict[int, int] = {}
    for index, layer in enumerate(layers):
        try:
            resolved = resolve_layer(layer, entry.depth, vlm=f"the vision tower of {entry.name}")
        except BadInput as error:
            problems.add(_at(where, layers, index), str(error))
            continue
        if resolved in seen:
            problems.add(_at(where, layers, index), f"{layer} and {seen[resolved]} are the same layer of {entry.name}")
        seen[resolved] = layer


def _budgets(params: Params, entry: CatalogEntry, problems: Problems) -> None:
    """Kept tokens, slots and top_k against the tokens of an image, where all images have the same."""
    whole, counts = entry.tokens, dict[int, str]()
    for index, keep in enumerate(params.keep):
        where = _at("keep", params.keep, index)
        try:
            count = tokens_kept(keep, whole)
        except BadInput as error:
            problems.add(where, str(error))
            continue
        if count is not None and count in counts:
            problems.add(where, f"{show(keep.written)} and {counts[count]} are both {count} tokens of {entry.name}")
        elif count is not None:
            counts[count] = show(keep.written)
    try:
        slots_of(params.slots, entry.name)
    except BadInput as error:
        problems.add("slots", str(error))
    for where, slots in _values(params, "slots"):
        if whole is not None and max(slots) > whole:
            problems.add(where, f"{max(slots)} slots, but an image of {entry.name} has {whole} tokens")
    for where, top_k in _values(params, "top_k"):
        if counts and top_k > min(counts):
            problems.add(where, f"{top_k} tokens a slot are more than the {min(counts)} that are kept")


def _values(params: Params, axis: str) -> Iterator[tuple[str, Any]]:
    """The values of an axis with their paths: those of the grid, then those of `ablate`."""
    values = params.train.on if axis == ON else getattr(params, axis)
    for index, value in enumerate(values):
        yield _at(axis, values, index), value
    yield from ((f"ablate.{axis}", value) for value in params.ablate.values(axis))
