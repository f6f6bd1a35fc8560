"""OC-VTP: slots gathered from a middle layer of the tower say which tokens go on (eq. 6 to 8 of the paper).

With `inside_tower=True` they alone go on in the tower, too (`ocvtp.methods.inside_tower`).

Letters: G images of a group, N tokens of an image, C tower width, k tokens kept.
"""

import copy
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocvtp.errors import BadInput, Incompatible
from ocvtp.methods.base import Encoded, Entry, Kept, Method, no_pruner, whole
from ocvtp.methods.inside_tower import OPTION, within
from ocvtp.pruner import OCPruner, PrunerConfig, checks
from ocvtp.pruner.config import check_number
from ocvtp.pruner.select import Selection
from ocvtp.vlms.catalogue import weights_of
from ocvtp.vlms.family import Family
from ocvtp.vlms.images import Facts

log = logging.getLogger(__name__)

_COMMIT = 40  # letters of a commit on the hub
_SELECTION = {"slots": None, "top_k": 1, "fill": None, "assignment": None, "surplus": None, "precision": None,
              "mass_power": None}  # fmt: skip
"""Options of `OCPruner.select`; None leaves them to the pruner's config."""


class OCVTP(Method):
    """A pruner looks at one layer; the tokens that its slots attend to most are handed on from the last."""

    fewer: bool = True  # fill="none" leaves gaps
    by_states = True

    def __init__(self, pruner: OCPruner, layer: int, facts: Facts, selection: Mapping[str, Any]) -> None:
        """`layer` is an index into `hidden_states`."""
        self.pruner, self._layer, self._selection, self.facts = pruner, layer, selection, facts
        # The authors fill gaps by the attention that tokens receive in the block whose output goes to the LLM.
        self._fill_block = facts.feature_layer - 1
        self._fills = (selection["fill"] or pruner.config.fill) == "attention"
        by_residual = (selection["assignment"] or pruner.config.assignment) not in ("shared", "distinct")
        self._judged = by_residual and pruner.config.residual_of == "handed_on"

    def layers(self) -> Collection[int]:  # noqa: D102 - as in Method
        judged = {self.facts.feature_layer} if self._judged else set()
        return {self._layer, *judged, *({self._fill_block} if self._fills else ())}

    def choose(self, encoded: Encoded) -> Kept:  # noqa: D102
        return Kept(self._select(encoded).indices_BS)

    def slots(self, encoded: Encoded) -> Tensor | None:  # noqa: D102
        return self._select(encoded).attention_BKN

    def _select(self, encoded: Encoded) -> Selection:
        tokens_GNC = encoded.tokens(self._layer)
        if self.pruner.device != tokens_GNC.device:
            self.pruner.to(tokens_GNC.device)
        scores_GN = encoded.received(self._fill_block) if self._fills else None
        options = {name: value for name, value in self._selection.items() if value is not None}
        judged_GNV = encoded.tokens(self.facts.feature_layer) if self._judged else None
        return self.pruner.select_details(
            tokens_GNC, encoded.keep, seeds=encoded.seeds, fill_scores=scores_GN, handed_on=judged_GNV, **options
        )


def _build(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    if pruner is None:
        raise BadInput(
            "oc-vtp needs a trained pruner: pruner=FOLDER_OR_OCPRUNER, such as models/tiny-llava/... after `dvc "
            "repro`. Without training: method='oc-vtp-untrained'"
        )
    if isinstance(pruner, str | Path):
        pruner = OCPruner.from_pretrained(pruner, decoder=False)
    if not isinstance(pruner, OCPruner):
        raise BadInput(f"pruner is a {type(pruner).__name__}: an OCPruner, a folder, or an id on the hub is needed")
    layer = _layer(family, pruner, options["layer"])
    _check(family, pruner, layer, anyway=options["other_vlm"])
    # A copy as it is now: it moves to the tower's device and has no dropout, while the caller's own may be in training.
    made = OCVTP(copy.deepcopy(pruner).eval(), layer, family.facts, _selection("oc-vtp", options))
    return within("oc-vtp", made, family, options)


def _selection(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `OCPruner.select`, before any work."""
    for option in ("slots", "top_k"):
        whole(name, options, option, 1)
    checks.options(**{o: options[o] for o in ("fill", "assignment", "surplus") if options[o] is not None})
    checks.precision(options["precision"])
    if options["mass_power"] is not None:
        check_number("mass_power", options["mass_power"], 0)
    return {option: options[option] for option in _SELECTION}


def _layer(family: Family, pruner: OCPruner, asked: int | None) -> int:
    """The index into `hidden_states` of the layer that the pruner reads."""
    trained = pruner.trained_for.layer
    layer = asked if trained is None else trained
    if layer is None:
        raise BadInput("this pruner does not say which layer it was trained for: give layer=9 or another")
    if asked is not None and family.index(asked) != family.index(layer):
        raise Incompatible(f"the pruner was trained for layer {trained}, but layer={asked} is asked for")
    return family.index(layer)


def _check(family: Family, pruner: OCPruner, layer: int, *, anyway: bool) -> None:
    """Refuse a pruner of another width, layer or VLM."""
    width, trained = pruner.config.token_dim, pruner.trained_for
    if width != family.facts.width:
        raise Incompatible(
            f"the pruner (of {trained.vlm or 'an unnamed VLM'}) reads tokens of width {width}, but the vision tower "
            f"of {_name(family)} has width {family.facts.width}"
        )
    if trained.tower_layer not in (None, layer):
        raise Incompatible(
            f"the pruner was trained for layer {trained.layer}, which was hidden_states[{trained.tower_layer}] of "
            f"{trained.vlm}, but is hidden_states[{layer}] of {_name(family)}"
        )
    if anyway or trained.weights is None:
        return
    # The weights in a folder are read only where that tells something: not for a pruner of a commit on the hub.
    weights = weights_of(family.model, read=len(trained.weights) != _COMMIT)
    if weights is None:
        log.warning("cannot tell whether %s is %s with weights %s, for which the pruner was trained (other_vlm=True if "
                    "its vision tower is the same)", _name(family), trained.vlm, trained.weights)  # fmt: skip
    elif weights != trained.weights:
        raise Incompatible(
            f"the pruner was trained for {trained.vlm} with weights {trained.weights}, but the model is "
            f"{_name(family)} with weights {weights}. If both have the same vision tower, give other_vlm=True"
        )


def _name(family: Family) -> str:
    entry = getattr(family.model, "ocvtp_entry", None)
    return str(entry.name if entry is not None else family.model.config.name_or_path or type(family.model).__name__)


def _build_untrained(family: Family, pruner: Any, options: Mapping[str, Any]) -> Method:
    """The same architecture with the random weights it starts from: what does training buy?"""
    no_pruner("oc-vtp-untrained", pruner)
    whole("oc-vtp-untrained", options, "weights_seed")
    made_of = {} if options["queries"] is None else {"queries": options["queries"]}
    grid = family.facts.grid or (24, 24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["weights_seed"])
        drawn = OCPruner(PrunerConfig(family.facts.width, grid=grid, decoder=None, **made_of)).eval()
    selection = _selection("oc-vtp-untrained", options)
    made = OCVTP(drawn, family.index(options["layer"]), family.facts, selection)
    return within("oc-vtp-untrained", made, family, options)


ENTRY = Entry(
    name="oc-vtp",
    acts="before the LLM",
    needs_text=False,
    source="OC-VTP, arXiv 2511.20439",
    random=True,
    trained=True,
    options={**_SELECTION, "layer": None, "other_vlm": False, OPTION: False},
    build=_build,
    loses={"fill": ("none",)},
)
UNTRAINED = Entry(
    name="oc-vtp-untrained",
    acts="before the LLM",
    needs_text=False,
    source="OC-VTP's pruner with the random weights that its training starts from",
    random=True,
    trained=False,
    options={**_SELECTION, "layer": 9, "weights_seed": 0, "queries": None, OPTION: False},
    build=_build_untrained,
    loses={"fill": ("none",)},
)
ENTRIES = (ENTRY, UNTRAINED)
