"""The OC-Pruner: gathers vision tokens into slots and keeps the token that each slot attends to most."""

from ocvtp.pruner.config import PrunerConfig
from ocvtp.pruner.model import OCPruner, PrunerOutput
from ocvtp.pruner.provenance import TrainedFor
from ocvtp.pruner.select import Selection

__all__ = ["OCPruner", "PrunerConfig", "PrunerOutput", "Selection", "TrainedFor"]
