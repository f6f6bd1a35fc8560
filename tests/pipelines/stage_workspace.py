"""A workspace in which stages run one after another."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_params import write_params

from cluster import Manifest, Task, is_published
from pipelines.stage import context as stage
from pipelines.stage import outputs


class Workspace:
    """A folder of outputs with a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[Task] = []
        """Tasks of the last stage that were not published before."""

    def run(self, module: ModuleType, **changes: Any) -> int:
        """Run a stage; nested entries are merged into the small ones."""
        self.ran = []
        return int(module.main(write_params(self.root, changes)))

    def files(self, path: str) -> dict[str, str]:
        return dict(outputs.checksums(self.root / path))

    def json(self, path: str) -> Any:
        return json.loads((self.root / path).read_text())

    def answers(self) -> bytes:
        """Those of the unpruned VLM to all questions, whatever the tasks that they came in."""
        tasks = [Manifest.read(path).about for path in (self.store / "answers").iterdir()]
        asked = {"method": "vanilla", "limit": None}.items()
        keys = {about.spec["shard"][0]: about.key for about in tasks if about.spec.items() >= asked}
        return b"".join((self.store / "answers" / keys[n] / "answers.jsonl").read_bytes() for n in range(len(keys)))

    @property
    def store(self) -> Path:
        return self.root / ".ocvtp/store"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Workspace]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OCVTP_STORE", raising=False)
        patch.delenv("DVC_STAGE", raising=False)
        really = stage.run

        def make(name: str) -> Workspace:
            work = Workspace(tmp_path_factory.mktemp(name))
            patch.setenv("OCVTP_ROOT", str(work.root))

            def run(tasks: list[Task], *args: Any, **kwargs: Any) -> Any:
                work.ran += [task for task in tasks if not is_published(task.out)]
                return really(tasks, *args, **kwargs)

            patch.setattr(stage, "run", run)
            return work

        yield make


@pytest.fixture(scope="module")
def work(opened: Callable[[str], Workspace]) -> Workspace:
    return opened("work")
