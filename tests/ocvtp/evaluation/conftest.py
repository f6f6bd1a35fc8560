"""A random tiny VLM on disk, and question sets about scenes."""

from pathlib import Path

import pytest
import torch

from ocvtp.data.question_sets import write_benchmarks
from pipelines.tiny.llava import TinyLlava


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llava with fresh weights."""
    folder = tmp_path_factory.mktemp("vlm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyLlava().make_model()
    model.save_pretrained(folder)
    TinyLlava().make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def question_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions of each benchmark."""
    folder = tmp_path_factory.mktemp("questions")
    write_benchmarks(folder, 12, seed=0)
    return folder
