"""Publication: a result appears under its name whole, verified and at most once, or not at all.

A published folder is its files and a `manifest.json` that lists them with size and SHA-256. The manifest is a function
of the task and the files: no times, hosts or random names, so that equal results are equal byte for byte.

`publish` writes the manifest into the folder of an attempt, forces both to disk and renames the folder to its name,
which fails if the name holds anything: that one rename decides. `publish_copy` does the same with files that exist
already. `verify` compares a published folder with its manifest, `set_aside` also renames a damaged one away, and
`drop` removes one.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from cluster.errors import BadTask, CorruptResult, Fenced
from cluster.store import verdicts
from cluster.store.layout import GONE, MANIFEST, RESUME, aside, files_in, patient, unavailable
from cluster.store.lease import remove_tree
from cluster.store.workspace import Workspace

log = logging.getLogger(__name__)

FORMAT = 1
FSYNC_THREADS = 16


@dataclass(frozen=True)
class File:
    """One file of a result: its path within the folder (with `/`), SHA-256 (hex) and size."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class About:
    """What a result is: the task that made it. `part` names the subfolder an adopted result came from."""

    key: str
    kind: str
    call: str
    spec: dict[str, Any]
    code: str
    part: str = ""


@dataclass(frozen=True)
class Manifest:
    """Content of a `manifest.json`."""

    about: About
    files: tuple[File, ...]

    @property
    def sums(self) -> dict[str, str]:
        """SHA-256 of each file, by path."""
        return {file.path: file.sha256 for file in self.files}

    def to_text(self) -> str:
        """The one text of this manifest."""
        data = {"format": FORMAT, **asdict(self.about), "files": [asdict(file) for file in self.files]}
        return json.dumps(data, sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: bytes, place: str) -> Self:
        """What `to_text` wrote, found at `place`; `CorruptResult` if it is something else, or a path leads out."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, this version reads {FORMAT}")
            about = About(**{name: data[name] for name in ("key", "kind", "call", "spec", "code", "part")})
            files = tuple(File(str(f["path"]), str(f["sha256"]), int(f["bytes"])) for f in data["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptResult(f"{place} is not a manifest: {error!r}") from error
        for path in (PurePosixPath(file.path) for file in files):
            if path.is_absolute() or ".." in path.parts:
                raise CorruptResult(f"{place} lists '{path}', which is outside of the folder")
        return cls(about, files)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Manifest of a published folder; `CorruptResult` if it has none, `StoreUnavailable` if it cannot be read."""
        path = Path(folder) / MANIFEST
        try:
            text = patient(path.read_bytes)()
        except GONE as error:
            raise CorruptResult(f"{folder} holds no {MANIFEST}: it was never published as a whole") from error
        return cls.from_text(text, str(path))


def verify(folder: Path, *, remembered: bool = False) -> Manifest:
    """Compare every file of a published folder with its manifest; others are ignored, with a warning.

    If `remembered`, nothing is read of what was found whole once and nobody touched since (`cluster.store.verdicts`).

    Raises:
        CorruptResult: naming the first file that is missing, of another size or of other content.
        StoreUnavailable: a file cannot be read.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    seen = verdicts.marks(folder) if remembered else []
    if seen and seen == verdicts.recall(folder):
        return manifest
    for file in manifest.files:
        path = folder / file.path
        try:
            found = patient(path.lstat)()
            if not stat.S_ISREG(found.st_mode):
                raise CorruptResult(f"{path} is not a regular file")
            if found.st_size != file.bytes:
                raise CorruptResult(f"{path} has {found.st_size} bytes, its manifest says {file.bytes}")
            if _sha256(path) != file.sha256:
                raise CorruptResult(f"{path} has other content than its manifest says (SHA-256 differs)")
        except GONE as error:
            raise CorruptResult(f"{path} is missing, its manifest lists it") from error
    if seen:
        verdicts.remember(folder, seen)
    there = {path.relative_to(folder).as_posix() for path in files_in(folder)}
    strays = there - {*manifest.sums, MANIFEST}
    if strays:
        log.warning("%s holds files that its manifest does not list: %s", folder, sorted(strays)[:5])
    return manifest


@patient
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = patient(os.open)(path, os.O_RDONLY)
    try:
        with unavailable(f"{path} cannot be forced to disk"):
            os.fsync(handle)  # never twice: the kernel says once that it lost what was written
    finally:
        os.close(handle)


def _seal(folder: Path, about: About) -> Manifest:
    """Write the manifest of `folder`, and force all that is in it to disk."""
    files = []
    for path in files_in(folder):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            raise BadTask(f"the call wrote a file named {MANIFEST}: that name is the store's, use another")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BadTask(f"the call left {name}, which is not a regular file: a result holds files only")
        files.append(File(name, _sha256(path), path.stat().st_size))
    if not files:
        folder.stat()  # `FileNotFoundError` if it was taken away
        raise BadTask("the call returned but wrote no file into its folder")
    manifest = Manifest(about, tuple(files))
    patient((folder / MANIFEST).write_text)(manifest.to_text())
    paths = {folder / MANIFEST, *(folder / file.path for file in files)}
    everything = paths | {parent for path in paths for parent in path.parents if parent.is_relative_to(folder)}
    # Beside each other: the file system commits what waits in one go, instead of once a file.
    with ThreadPoolExecutor(min(len(everything), FSYNC_THREADS)) as pool:
        list(pool.map(_fsync, everything))
    return manifest


def publish(workspace: Workspace, about: About, *, expected: Mapping[str, str] | None = None) -> bool:
    """Publish what lies in the workspace, which is gone afterwards; False if an equal task was first (ours is dropped).

    `about` is the head of the manifest; `expected` has the SHA-256 of each file, where it is known beforehand.

    Raises:
        BadTask: the call wrote nothing, or something that is not a file.
        CorruptResult: the files are not the expected ones.
        Fenced: the attempt lost its lease.
        StoreUnavailable: the file system failed for longer than it was waited for.
        OSError: the disk is full. As after every error, nothing was published.
    """
    folder, out = workspace.folder, workspace.out
    with unavailable(f"{out} cannot be published"):
        workspace.check()
        with contextlib.suppress(FileNotFoundError):
            patient(os.rename)(folder / RESUME, workspace.root / RESUME)
        try:
            found = _seal(folder, about).sums
        except FileNotFoundError:
            workspace.check()  # the folder was taken away while we read it
            raise
        wrong = {} if expected is None else dict(found.items() ^ expected.items())
        if wrong:
            path = min(wrong)
            is_, was = (sums.get(path, "missing") for sums in (found, expected or {}))
            raise CorruptResult(f"{path} for {out} is {is_}, but {was} in its manifest (SHA-256)")
        workspace.check()
        won = _move_into_place(workspace, about)
        _fsync(out.parent)
        # What was handed over is of no use now; without it the rest goes too.
        shutil.rmtree(workspace.root / RESUME, ignore_errors=True)
        if not won:
            shutil.rmtree(folder, ignore_errors=True)
        workspace.discard()
    return won


def _move_into_place(workspace: Workspace, about: About) -> bool:
    """Rename the folder to its name; False if a sound result of the same task is there (a damaged one is set aside)."""
    folder, out = workspace.folder, workspace.out
    ours = patient(os.stat)(folder)
    try:
        while not _rename(folder, out):
            corrupt = set_aside(out)
            if corrupt is not None:
                log.warning("%s", corrupt)
            elif (theirs := Manifest.read(out)).about.key != about.key:
                raise BadTask(f"{out} holds the result of another task: {theirs.about.key}")
            else:
                return False
    except FileNotFoundError as error:
        if not _is_same(out, ours):  # or it was a rename that was said to have failed
            workspace.lost = True
            raise Fenced(f"another attempt took over {out}: this result is dropped") from error
    return True


def _rename(source: Path, target: Path) -> bool:
    """Give a folder another name; False if that one holds anything. `FileNotFoundError` if `source` is gone."""
    try:
        patient(os.rename)(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    return True


def _is_same(path: Path, known: os.stat_result) -> bool:
    """Whether `path` is still what was seen before."""
    try:
        return os.path.samestat(patient(os.lstat)(path), known)
    except GONE:
        return False


def set_aside(folder: Path, *, remembered: bool = False) -> CorruptResult | None:
    """Verify a published folder as `verify` does; move it away if it is damaged, so that its task is planned again.

    Another run may do the same at the same time, and publish it anew: what it published is left, or put back. Returns
    what is wrong with it, and where it lies now if it was this call that moved it; None if it is sound.
    """
    while True:
        try:
            seen = patient(os.lstat)(folder)
            verify(folder, remembered=remembered)
            return None
        except GONE:
            return CorruptResult(f"{folder} is not there")
        except CorruptResult as corrupt:
            target = aside(folder, "corrupt")
            with contextlib.suppress(FileNotFoundError):
                if not _is_same(folder, seen) or not _rename(folder, target):
                    continue
                if _is_same(target, seen):
                    return CorruptResult(f"{corrupt}; moved to {target}")
                # Published in the instant before: it goes back, unless yet another run has published an equal one.
                if not _rename(target, folder):
                    drop(target)


def drop(folder: Path) -> None:
    """Remove a published folder, or one put aside: gone for readers at once, however long removing takes."""
    doomed = aside(folder, "dropped")
    with contextlib.suppress(*GONE):  # another run was faster
        patient(os.rename)(folder, doomed)
        remove_tree(doomed)


def publish_copy(
    workspace: Workspace, about: About, sums: Mapping[str, str], fetch: Callable[[str, Path], None]
) -> None:
    """`publish` files that exist elsewhere, once `fetch(path, target)` has put each of those in `sums` at its place.

    The workspace is gone afterwards, whatever happens; `sums` has the SHA-256 of each file by its path.
    """
    try:
        with workspace.heartbeat():
            for path in sums:
                target = workspace.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                fetch(path, target)
            publish(workspace, about, expected=sums)
    finally:
        workspace.discard()
