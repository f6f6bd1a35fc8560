"""Published results in a second place, such as s3://bucket/ocvtp: fetched instead of made, uploaded once made.

Any file system of fsspec. `KIND/KEY.json` is the manifest of a result and is written last, so that what is listed is
whole; its files lie below `KIND/KEY/`. What is fetched is published here like any result, file by file against the
checksums of the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from cluster.errors import Corrupt, NotAvailable
from cluster.store.layout import new_attempt
from cluster.store.publish import MANIFEST, Manifest, publish, safe
from cluster.store.workspace import Busy, Workspace

log = logging.getLogger(__name__)

AT_ONCE = 8  # transfers


class Remote:
    """A place for results beside the store.

    Raises:
        NotAvailable: it cannot be reached, or its kind of file system needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise NotAvailable(f"cluster.remote {url}: {error}") from error
        self._root: str = root.rstrip("/")
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="remote")
        self._known: dict[str, set[str]] = {}
        self._uploads: dict[Path, Future[None]] = {}

    def _has(self, out: Path) -> bool:
        kind = out.parent.name
        if kind not in self._known:
            self._known[kind] = self._listed(kind)
        return out.name in self._known[kind]

    def _listed(self, kind: str) -> set[str]:
        try:
            names = self._fs.ls(f"{self._root}/{kind}", detail=False, refresh=True)
        except FileNotFoundError:
            return set()
        except Exception as error:  # fsspec passes on whatever the client of a store raises
            raise NotAvailable(f"cluster.remote {self.url} cannot be read: {type(error).__name__}: {error}") from error
        leaves = (str(name).rstrip("/").rpartition("/")[2] for name in names)
        return {leaf.removesuffix(".json") for leaf in leaves if leaf.endswith(".json")}

    def fetch(self, outs: Iterable[Path], *, check: Callable[[], None]) -> int:
        """Publish here those of these results that it has, many at a time, looking for signals by `check`; how many.

        Raises:
            NotAvailable: it cannot be read.
        """
        wanted = [out for out in outs if self._has(out)]
        if wanted:
            log.info("fetching %d results from %s", len(wanted), self.url)
        fetches = [self._pool.submit(self._fetch, out) for out in wanted]
        for fetch in fetches:
            while not wait([fetch], 0.25).done:
                check()
        return sum(fetch.result() for fetch in fetches)

    def _fetch(self, out: Path) -> bool:
        """One result; False if it has to be made after all."""
        place = f"{self._root}/{out.parent.name}/{out.name}"
        try:
            workspace = Workspace.claim(out, new_attempt())
        except Busy:
            return False  # somebody makes it right now
        try:
            with workspace.heartbeat():
                text = workspace.root / "fetched.json"
                self._fs.get_file(f"{place}.json", str(text))
                text.rename(text.with_name(MANIFEST))
                manifest = Manifest.read(workspace.root)
                if manifest.about.key != out.name:
                    raise Corrupt(f"{self.url}/{out.parent.name}/{out.name}.json is of {manifest.about.key}")
                (workspace.root / MANIFEST).unlink()
                for file in manifest.files:
                    target = workspace.folder / safe(file.path, out)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(f"{place}/{file.path}", str(target))
                publish(workspace, manifest.about, expected={file.path: file.sha256 for file in manifest.files})
        except Exception as error:  # whatever a client raises: the result can be made here
            log.warning("%s/%s is not taken from %s: %s", out.parent.name, out.name, self.url, error)
            return False
        finally:
            workspace.discard()
        return True

    def upload(self, outs: Iterable[Path]) -> None:
        """Begin to upload published results that it does not have; `finish` waits for them."""
        for out in outs:
            if not self._has(out):
                self._uploads[out] = self._pool.submit(self._upload, out)

    def _upload(self, out: Path) -> None:
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

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for the uploads, looking for signals by `check`.

        Those that fail are named; they are published here all the same, and the next run uploads them.
        """
        if self._uploads:
            log.info("uploading to %s: %d results", self.url, len(self._uploads))
        failed = []
        for out, upload in self._uploads.items():
            while not wait([upload], 0.25).done:
                check()
            if upload.exception() is not None:
                failed.append((out, upload.exception()))
        if failed:
            (out, error), count = failed[0], len(failed)
            log.warning("%d results were not uploaded to %s, and will be by the next run. The first, %s: %s",
                        count, self.url, f"{out.parent.name}/{out.name}", error)  # fmt: skip
        self._uploads.clear()

    def close(self) -> None:
        """Drop transfers that have not begun, and wait for those that have."""
        self._pool.shutdown(cancel_futures=True)
