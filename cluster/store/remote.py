"""Published results in a second place, such as s3://bucket/results, for `python -m cluster push` and `pull`.

Any file system of fsspec. `KIND/KEY.json` is the manifest of a result and is written last, so that what is listed is
whole; its files lie below `KIND/KEY/`. What is pulled is published here like any result, file by file against the
checksums of the manifest.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

from cluster.errors import CannotRun, CorruptResult
from cluster.store.layout import new_attempt
from cluster.store.publish import MANIFEST, Manifest, publish, safe
from cluster.store.workspace import Workspace

AT_ONCE = 8  # transfers


class Remote:
    """A place for results beside the store.

    Raises:
        CannotRun: it cannot be reached, or its kind of file system needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise CannotRun(f"the remote {url} cannot be used: {error}") from error
        self._root: str = root.rstrip("/")

    def names(self) -> list[str]:
        """`KIND/KEY` of all that it holds, sorted.

        Raises:
            CannotRun: it cannot be read.
        """
        kinds = [name for name in self._list("") if not name.startswith(".")]
        leaves = {kind: self._list(f"/{kind}") for kind in kinds}
        return sorted(f"{kind}/{leaf[:-5]}" for kind in kinds for leaf in leaves[kind] if leaf.endswith(".json"))

    def _list(self, folder: str) -> list[str]:
        try:
            found = self._fs.ls(f"{self._root}{folder}", detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:  # fsspec passes on whatever the client of a store raises
            raise CannotRun(f"the remote {self.url} cannot be read: {type(error).__name__}: {error}") from error
        return [str(name).rstrip("/").rpartition("/")[2] for name in found]

    def push(self, out: Path) -> None:
        """Upload a published result; whatever the client raises is passed on."""
        place = f"{self._root}/{out.parent.name}/{out.name}"
        self._fs.makedirs(f"{self._root}/{out.parent.name}", exist_ok=True)
        for file in Manifest.read(out).files:
            target = f"{place}/{file.path}"
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(out / file.path), target)
        # In one step: a listing shows all of the manifest or none.
        half = f"{place}.{new_attempt()}"
        self._fs.put_file(str(out / MANIFEST), half)
        self._fs.mv(half, f"{place}.json")

    def pull(self, out: Path) -> None:
        """Publish a result here, verified; whatever the client raises is passed on.

        Raises:
            Busy: somebody makes it here right now.
            CorruptResult: it is damaged there.
        """
        place = f"{self._root}/{out.parent.name}/{out.name}"
        workspace = Workspace.claim(out, new_attempt())
        try:
            with workspace.heartbeat():
                self._fs.get_file(f"{place}.json", str(workspace.root / MANIFEST))
                manifest = Manifest.read(workspace.root)
                if manifest.about.key != out.name:
                    raise CorruptResult(f"{self.url}/{out.parent.name}/{out.name}.json is of {manifest.about.key}")
                (workspace.root / MANIFEST).unlink()
                for file in manifest.files:
                    target = workspace.folder / safe(file.path, out)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(f"{place}/{file.path}", str(target))
                publish(workspace, manifest.about, expected={file.path: file.sha256 for file in manifest.files})
        finally:
            workspace.discard()


def transfer(outs: Iterable[Path], one: Callable[[Path], None]) -> Iterator[tuple[Path, Exception | None]]:
    """Push or pull results, several at a time, and say of each how it ended.

    Its threads are daemons: when the caller is interrupted nothing waits for a transfer that hangs.
    """
    waiting, ended = SimpleQueue[Path](), SimpleQueue[tuple[Path, Exception | None]]()

    def work() -> None:
        with contextlib.suppress(Empty):
            while True:
                out = waiting.get_nowait()
                try:
                    one(out)
                except Exception as error:  # whatever a client raises: the others go on
                    ended.put((out, error))
                else:
                    ended.put((out, None))

    for out in (todo := list(outs)):
        waiting.put(out)
    for _ in todo[:AT_ONCE]:
        threading.Thread(target=work, name="transfer", daemon=True).start()
    for _ in todo:
        yield ended.get()
