"""Benchmarks asked and scored by lmms-eval, with intervals."""
