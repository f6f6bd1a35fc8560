"""What a pruner was trained for: stands in its config.json beside what it is made of."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ocvtp.errors import BadInput, Incompatible


@dataclass(frozen=True)
class TrainedFor:
    """None where it is not known.

    Attributes:
        vlm: name in the catalogue or on the hub.
        revision: of the VLM.
        weights: fingerprint of the VLM's weights.
        layer: whose tokens it reads, counted as in the paper.
        tower_layer: the index into `hidden_states` that it stands for.
        preprocessing: how an image became pixels.
        loss: one of `ocvtp.pruner.loss.LOSSES`.
        slots: slot counts drawn in training.
        seed: of the training.
    """

    vlm: str | None = None
    revision: str | None = None
    weights: str | None = None
    layer: int | None = None
    tower_layer: int | None = None
    preprocessing: str | None = None
    loss: str | None = None
    slots: tuple[int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.slots is not None:
            object.__setattr__(self, "slots", tuple(self.slots))

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        return {**asdict(self), "slots": None if self.slots is None else list(self.slots)}

    def require(self, **wanted: object) -> None:
        """Refuse use for something else: `Incompatible` lists what is known to differ.

        Args:
            wanted: attributes and the values that are needed, such as `vlm` and `weights`.
        """
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(wanted) - known):
            raise BadInput(f"a pruner does not record {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        wrong = [
            f"{name} is {getattr(self, name)!r} but {value!r} is needed"
            for name, value in wanted.items()
            if value is not None and getattr(self, name) not in (None, value)
        ]
        if wrong:
            raise Incompatible(f"this pruner was trained for something else: {'; '.join(wrong)}")
