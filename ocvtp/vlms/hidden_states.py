"""Which layer of a vision tower is meant.

Layers are counted as in the paper and as in `transformers`: layer 9 is `hidden_states[9]`, the output of the ninth
encoder block, which has index 8 where blocks are counted from 0 (as forward hooks do). Negative layers count from the
end: -1 is the output of the last block, -2 the one before. `hidden_states[0]` comes before all blocks and is no layer.
"""

from collections.abc import Iterable

from ocvtp.errors import BadInput


def resolve_layer(layer: int, depth: int, *, vlm: str = "the tower") -> int:
    """The index into `hidden_states` (1 to `depth`) of a layer.

    Args:
        layer: from 1 to `depth`, or from -`depth` to -1.
        depth: encoder blocks of the tower.
        vlm: what to call the tower in the message.

    Raises:
        BadInput: outside of that range, or no whole number.
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise BadInput(f"layer {layer!r} is not a whole number")
    if not 1 <= abs(layer) <= depth:
        raise BadInput(
            f"layer {layer} is outside of {vlm}: it has {depth} encoder blocks, so layers 1 to {depth} or -{depth} to"
            " -1 are legal. Layers are counted as in the paper: layer 9 is hidden_states[9], the output of the block"
            " with index 8"
        )
    return layer if layer > 0 else depth + 1 + layer


def resolve_layers(layers: Iterable[int], depth: int, *, vlm: str = "the tower") -> dict[int, int]:
    """Each layer as asked for and its index into `hidden_states`, in the order given; `BadInput` if there is none."""
    resolved = {layer: resolve_layer(layer, depth, vlm=vlm) for layer in layers}
    if not resolved:
        raise BadInput(f"no layer of {vlm} asked for: at least one of 1 to {depth} is needed")
    return resolved
