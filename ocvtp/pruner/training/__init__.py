"""The parts of training; `ocvtp.pruner.train` puts them together."""
