"""Pruned VLMs in a serving engine: the plugin for vLLM, and folders that vLLM reads."""
