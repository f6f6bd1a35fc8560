"""Layers are counted as in the paper."""

import pytest

from ocvtp.errors import BadInput
from ocvtp.vlms.hidden_states import resolve_layer, resolve_layers


def test_layers_are_places_in_a_list_of_hidden_states() -> None:
    depth = 24
    hidden_states = ["before all blocks", *(f"output of block {i}" for i in range(depth))]
    for layer in (*range(1, depth + 1), *range(-depth, 0)):
        index = resolve_layer(layer, depth)
        assert hidden_states[index] == hidden_states[layer]
        assert hidden_states[index] == f"output of block {index - 1}"
    assert resolve_layers([9, -2, 23], depth) == {9: 9, -2: 23, 23: 23}


@pytest.mark.parametrize("layer", [0, 13, -13, 30])
def test_a_layer_outside_is_refused_with_the_legal_range(layer: int) -> None:
    with pytest.raises(
        BadInput, match=rf"layer {layer} is outside of tiny: .*layers 1 to 12 or -12 to -1.*hidden_states\[9\]"
    ):
        resolve_layer(layer, 12, vlm="tiny")


@pytest.mark.parametrize("layer", [9.0, "9", True, None])
def test_a_layer_is_a_whole_number(layer: object) -> None:
    with pytest.raises(BadInput, match="not a whole number"):
        resolve_layer(layer, 12)  # type: ignore[arg-type]


def test_no_layer_is_refused() -> None:
    with pytest.raises(BadInput, match="no layer"):
        resolve_layers([], 12)
