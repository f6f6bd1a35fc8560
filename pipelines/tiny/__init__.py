"""How tiny-llava is made: `python -m pipelines.tiny train`."""
