"""The parts of training; `ocvtp.pruner.training.run` puts them together."""
