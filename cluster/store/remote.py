"""Published results in a second place, such as s3://bucket/results, for `python -m cluster push` and `pull`.

Any file system of fsspec. `KIND/KEY.json` is the manifest of a result and is written last, so that what is listed is
whole; its files lie below `KIND/KEY/`. What is pulled is published here like any result, file by file against the
checksums of the manifest.
"""

from pathlib import Path

from cluster.errors import CannotRun, CorruptResult
from cluster.store.layout import MANIFEST, new_attempt
from cluster.store.publish import Manifest, publish_copy
from cluster.store.workspace import Workspace


class Remote:
    """A place for results beside the store; `CannotRun` if its kind of file system needs a package that is missing."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise CannotRun(f"the remote {url} cannot be used: {error}") from error
        self._root: str = root.rstrip("/")

    def names(self) -> list[str]:
        """`KIND/KEY` of all that it holds, sorted; `CannotRun` if it cannot be read."""
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

        `Busy` if somebody makes it here right now, `CorruptResult` if it is damaged there.
        """
        place = f"{self._root}/{out.parent.name}/{out.name}"
        manifest = Manifest.from_text(self._fs.cat_file(f"{place}.json"), f"{place}.json")
        if manifest.about.key != out.name:
            raise CorruptResult(f"{place}.json is the manifest of {manifest.about.key}")

        def fetch(path: str, target: Path) -> None:
            self._fs.get_file(f"{place}/{path}", str(target))

        publish_copy(Workspace.claim(out, new_attempt()), manifest.about, manifest.sums, fetch)
