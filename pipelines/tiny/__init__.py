"""How tiny-llava and tiny-qwen are made: `python -m pipelines.tiny train`."""
