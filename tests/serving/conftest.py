"""One engine at a time, started when the first test needs it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_engine import ENVIRONMENT, Asked, Engine

from ocvtp.data.questions import KINDS, ask
from ocvtp.data.scenes import make_scene

RUNNING: dict[str, Engine] = {}
TINY = Path(__file__).parents[2] / "ocvtp/vlms/tiny_llava"


@pytest.fixture(scope="session", autouse=True)
def environment() -> Path:
    """Where vLLM is installed."""
    if not (ENVIRONMENT / "bin/vllm").is_file():
        pytest.skip(f"NOT PROVEN: no vLLM in {ENVIRONMENT}; `make serve-test` installs it and runs these tests")
    return ENVIRONMENT


@pytest.fixture(scope="session")
def serve(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Gives the engine of a model and a setting: the running one, if it is that, or a new one in its place."""

    def get(model: Path = TINY, *, again: bool = False, **overrides: Any) -> Engine:
        key = f"{model} {json.dumps(overrides, sort_keys=True)}"
        if key not in RUNNING or again:
            stop()
            engine = Engine(model, overrides, tmp_path_factory.mktemp("engine") / "log")
            RUNNING[key] = engine.__enter__()
        return RUNNING[key]

    yield get
    stop()


@pytest.fixture
def stopped(environment: Path) -> None:
    """No engine is running."""
    stop()


def stop() -> None:
    """The engine that is running, if one is."""
    while RUNNING:
        RUNNING.popitem()[1].__exit__()


@pytest.fixture(scope="session")
def questions() -> list[Asked]:
    """200 questions about 100 scenes."""
    found, number = list[Asked](), 0
    while len(found) < 200:
        scene = make_scene(7, "benchmark", number)
        picture = Image.fromarray(scene.pixels_HW3)
        rng = np.random.default_rng(number)
        asked = [question for kind in KINDS if (question := ask(scene, kind, rng)) is not None]
        found += [Asked(picture, f"{q.text}\nAnswer the question using a single word or phrase.") for q in asked[:2]]
        number += 1
    return found[:200]
