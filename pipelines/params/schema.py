"""Types of entries of params.yaml that pydantic has not: lists without repeats, axes, slot counts, budgets."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, WrapValidator

from cluster.validation import nearest, show
from ocvtp.methods.budget import Budget
from ocvtp.pruner.loss import LOSSES

T = TypeVar("T")
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Layer = Annotated[int, Field(ge=-1000, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _many(value: Any, check: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    items = check(tuple(value) if isinstance(value, list) else value)
    if not items:
        raise ValueError("the list is empty: at least one value is needed")
    for index, item in enumerate(items):
        if item in items[:index]:
            raise ValueError(f"{show(value[index])} is given twice")
    return items


Many = Annotated[tuple[T, ...], WrapValidator(_many)]
"""A list, not empty, without repeats."""
Axis = Annotated[Many[T], BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,))]
"""An axis of the grid: one value or a list of values; a tuple comes out."""


def _loss(name: str) -> str:
    if name not in LOSSES:
        raise ValueError(f"{show(name)} is not legal{nearest(name, LOSSES)}")
    return name


Loss = Annotated[str, AfterValidator(_loss)]


def _ascending(counts: tuple[int, ...]) -> tuple[int, ...]:
    if list(counts) != sorted(counts):
        raise ValueError(f"{list(counts)} is not in ascending order: {sorted(counts)}")
    return counts


OWN = "own"
"""Value of `slots`: what the catalogue has for each VLM."""
Slots = Annotated[Many[Positive], AfterValidator(_ascending)]
"""Slot counts drawn in training."""
_SLOTS: TypeAdapter[tuple[int, ...]] = TypeAdapter(Slots, config=ConfigDict(strict=True))


def _slots_axis(value: Any, check: Callable[[Any], tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    """[16, 32] is one value, [[16, 32], [64]] is a grid of two, and `own` is none: those of each VLM."""
    if value in (OWN, ()):
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{show(value)} is not a list of slot counts, such as [16, 32, 48], and not {OWN}")
    if any(isinstance(item, list | tuple) for item in value):
        return check(value)
    return (_SLOTS.validate_python(value),)


SlotsAxis = Annotated[Many[Slots], WrapValidator(_slots_axis)]
Keep = Annotated[Budget, BeforeValidator(lambda value: value if isinstance(value, Budget) else Budget.parse(value))]
"""48 is a count, 0.333 and "33.3%" are shares."""
