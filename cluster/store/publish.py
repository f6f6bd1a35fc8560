"""Publication: a result appears under its name whole, verified and at most once, or not at all.

A published folder is its files and a `manifest.json` that lists them with size and SHA-256. The manifest is a
function of the task and the files: no times, hosts or random names, so that equal results are equal byte for
byte.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import BadTask, CorruptResult, Fenced, StoreUnavailable
from cluster.store import verdicts
from cluster.store.faults import GONE, is_transient, patient
from cluster.store.layout import RESUME, aside, check_out, new_attempt
from cluster.store.lease import Watch
from cluster.store.leftovers import remove_tree
from cluster.store.workspace import Busy, Workspace

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
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

    def to_text(self) -> str:
        """The one text of this manifest."""
        data = {"format": FORMAT, **asdict(self.about), "files": [asdict(file) for file in self.files]}
        return json.dumps(data, sort_keys=True, indent=1) + "\n"

    @classmethod
    @patient
    def read(cls, folder: Path) -> Manifest:
        """Manifest of a published folder.

        Raises:
            CorruptResult: there is none, or it is not one.
            StoreUnavailable: it cannot be read.
        """
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_bytes())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, this version reads {FORMAT}")
            about = About(**{name: data[name] for name in ("key", "kind", "call", "spec", "code", "part")})
            files = tuple(File(str(f["path"]), str(f["sha256"]), int(f["bytes"])) for f in data["files"])
        except GONE as error:
            raise CorruptResult(f"{folder} holds no {MANIFEST}: it was never published as a whole") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptResult(f"{path} is not a manifest: {error!r}") from error
        return cls(about, files)


@patient
def is_published(folder: Path) -> bool:
    """Whether a result is there: one look-up. `verify` reads every byte."""
    try:
        return stat.S_ISREG((Path(folder) / MANIFEST).stat().st_mode)
    except GONE:
        return False


def verify(folder: Path, *, remembered: bool = False) -> Manifest:
    """Compare every file of a published folder with its manifest.

    Files that the manifest does not list are no part of the result: they are ignored, with a warning.

    Args:
        folder: of a store.
        remembered: leave out files that were read once and that nobody touched since (`cluster.store.verdicts`), and
            remember those that are read now.

    Raises:
        CorruptResult: naming the first file that is missing, of another size or of other content.
        StoreUnavailable: a file cannot be read.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    known = verdicts.recall(folder) if remembered else {}
    whole = {}
    for file in manifest.files:
        verdict = _verify_file(folder / safe(file.path, folder), file, known.get(file.path))
        if verdict is not None:
            whole[file.path] = verdict
    if remembered and whole != known:
        verdicts.remember(folder, whole)
    strays = {path for path, _ in _files(folder)} - {file.path for file in manifest.files} - {MANIFEST}
    if strays:
        log.warning("%s holds files that its manifest does not list: %s", folder, sorted(strays)[:5])
    return manifest


@patient
def _verify_file(path: Path, file: File, known: verdicts.Verdict | None) -> verdicts.Verdict | None:
    """What to remember of a file that is whole; None if its next change might not show."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CorruptResult(f"{path} is not a regular file")
        if found.st_size != file.bytes:
            raise CorruptResult(f"{path} has {found.st_size} bytes, its manifest says {file.bytes}")
        verdict = verdicts.mark(found), file.sha256
        settled = verdicts.settled(verdict[0])
        if known != verdict and _sha256(path) != file.sha256:
            raise CorruptResult(f"{path} has other content than its manifest says (SHA-256 differs)")
    except GONE as error:
        raise CorruptResult(f"{path} is missing, its manifest lists it") from error
    return verdict if settled else None


def safe(path: str, folder: Path) -> Path:
    """The path of a file within a result; `CorruptResult` if it leads out of it."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise CorruptResult(f"the manifest of {folder} lists {path!r}, which is outside of the folder")
    return Path(pure)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fail(error: OSError) -> None:
    raise error  # without it, os.walk leaves out in silence what it cannot read


@patient
def _files(folder: Path) -> list[tuple[str, Path]]:
    """(relative path with `/`, path) of every file, sorted. Links are files, those to folders too: none is followed."""
    found = []
    for root, folders, names in os.walk(folder, onerror=_fail):
        for path in [Path(root) / name for name in names + folders]:
            if path.name in names or path.is_symlink():
                found.append((path.relative_to(folder).as_posix(), path))
    return sorted(found)


def _fsync(path: Path) -> None:
    handle = patient(os.open)(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if is_transient(error):  # never twice: the kernel says once that it lost what was written
            raise StoreUnavailable(f"{path} cannot be forced to disk: {error}") from error
        raise
    finally:
        os.close(handle)


def _seal(folder: Path, about: About) -> Manifest:
    """Write the manifest of `folder`, and force all that is in it to disk."""
    files = []
    for name, path in _files(folder):
        if name == MANIFEST:
            raise BadTask(f"the call wrote a file named {MANIFEST}: that name is the store's, use another")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BadTask(f"the call left {name}, which is not a regular file: a result holds files only")
        files.append(File(name, patient(_sha256)(path), path.stat().st_size))
    if not files:
        raise BadTask("the call returned but wrote no file into its folder")
    manifest = Manifest(about, tuple(files))
    patient((folder / MANIFEST).write_text)(manifest.to_text())
    paths = {folder / MANIFEST, *(path for _, path in _files(folder))}
    everything = paths | {parent for path in paths for parent in path.parents if parent.is_relative_to(folder)}
    # Beside each other: the file system commits what waits in one go, instead of once a file.
    with ThreadPoolExecutor(min(len(everything), FSYNC_THREADS)) as pool:
        list(pool.map(_fsync, everything))
    return manifest


def publish(workspace: Workspace, about: About, *, expected: Mapping[str, str] | None = None) -> bool:
    """Publish what lies in the workspace; False if an equal task was published first (ours is then dropped).

    Args:
        workspace: of the attempt; it is gone afterwards.
        about: the head of the manifest.
        expected: SHA-256 of each file, where it is known beforehand.

    Raises:
        BadTask: the call wrote nothing, or something that is not a file.
        CorruptResult: the files are not the expected ones; nothing was published.
        Fenced: the attempt lost its lease; nothing was published.
        StoreUnavailable: the file system failed for longer than it was waited for.
        OSError: the disk is full; nothing was published.
    """
    try:
        return _publish(workspace, about, expected)
    except OSError as error:
        if is_transient(error):
            raise StoreUnavailable(f"{workspace.out} cannot be published: {error}") from error
        raise


def _publish(workspace: Workspace, about: About, expected: Mapping[str, str] | None) -> bool:
    workspace.check()
    folder, out = workspace.folder, workspace.out
    with contextlib.suppress(FileNotFoundError):
        patient(os.rename)(folder / RESUME, workspace.root / RESUME)
    try:
        manifest = _seal(folder, about)
    except FileNotFoundError:
        workspace.check()  # the folder was taken away while we read it
        raise
    found = {file.path: file.sha256 for file in manifest.files}
    wanted = found if expected is None else expected
    for path, sha256 in sorted(found.items() ^ wanted.items()):
        if path in found and path in wanted:
            raise CorruptResult(f"{path} for {out} has other content than its manifest says (SHA-256 differs)")
        raise CorruptResult(
            f"{path} (SHA-256 {sha256}) for {out} is {'missing' if path in wanted else 'not in its manifest'}"
        )
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
    folder, out = workspace.folder, workspace.out
    ours = patient(os.stat)(folder)
    while True:
        try:
            patient(os.rename)(folder, out)  # fails if the target holds anything, and if we were fenced
        except FileNotFoundError as error:
            if is_same(out, ours):  # a rename that was said to have failed
                return True
            workspace.lost = True
            raise Fenced(f"another attempt took over {out}: this result is dropped") from error
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if (corrupt := set_aside(out)) is not None:
                log.warning("%s", corrupt)
                continue
            if (theirs := Manifest.read(out)).about.key != about.key:
                raise BadTask(f"{out} holds the result of another task: {theirs.about.key}") from error
            return False
        return True


def is_same(path: Path, known: os.stat_result | None) -> bool:
    """Whether `path` is still what was seen before."""
    try:
        return known is not None and os.path.samestat(patient(os.lstat)(path), known)
    except GONE:
        return False


def set_aside(folder: Path, *, remembered: bool = False) -> CorruptResult | None:
    """Verify a published folder as `verify` does; move it away if it is damaged, so that its task is planned again.

    Another run may do the same at the same time, and publish it anew: what it published is left, or put back.

    Returns:
        What is wrong with it, and where it lies now if it was this call that moved it; None if it is sound.
    """
    while True:
        try:
            seen = patient(os.lstat)(folder)
            verify(folder, remembered=remembered)
        except GONE:
            return CorruptResult(f"{folder} is not there")
        except CorruptResult as corrupt:
            if not is_same(folder, seen):
                continue
            target = aside(folder, "corrupt")
            try:
                patient(os.rename)(folder, target)
            except GONE:
                continue
            if is_same(target, seen):
                return CorruptResult(f"{corrupt}; moved to {target}")
            _put_back(target, folder)
        else:
            return None


def _put_back(target: Path, folder: Path) -> None:
    """Undo the renaming of a result that was published in the instant before."""
    try:
        patient(os.rename)(target, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        drop(target)  # yet another run has published an equal one


def drop(folder: Path) -> None:
    """Remove a published folder, or one put aside: gone for readers at once, however long removing takes."""
    doomed = aside(folder, "dropped")
    try:
        patient(os.rename)(folder, doomed)
    except GONE:
        return  # another run was faster
    remove_tree(doomed)


def adopt(src_subfolder: Path, out: Path) -> Manifest:
    """Publish a subfolder of a published folder as a result of its own, by hard links, in one step.

    So one task can make several results (all layers of one pass) that live on their own afterwards. The files
    are linked, or copied where the file system cannot link; a result that is already there is left as it is.

    Args:
        src_subfolder: a folder strictly inside a published folder.
        out: where to publish; its name becomes the key, its parent's name the kind.

    Raises:
        BadTask: `src_subfolder` is not inside a published folder, or holds no file of it.
        CorruptResult: the published folder disagrees with its manifest.
    """
    src, out = Path(src_subfolder).resolve(), Path(out)
    check_out(out)
    if is_published(out):
        return Manifest.read(out)
    owner = next((folder for folder in src.parents if is_published(folder)), None)
    if owner is None:
        raise BadTask(f"{src} is not inside a published folder")
    source = Manifest.read(owner)
    part = src.relative_to(owner).as_posix()
    listed = [(file.path[len(part) + 1 :], file) for file in source.files if file.path.startswith(f"{part}/")]
    if not listed:
        raise BadTask(f"{owner} was published without files in {part!r}")
    about = About(out.name, out.parent.name, source.about.call, source.about.spec, source.about.code, part)
    workspace = _claim(out)
    if workspace is not None:
        try:
            with workspace.heartbeat():
                for name, _ in listed:
                    _link(src / name, workspace.folder / name)
                publish(workspace, about, expected={name: file.sha256 for name, file in listed})
        finally:
            workspace.discard()
    return Manifest.read(out)


def _claim(out: Path) -> Workspace | None:
    """A workspace for `out`, once nobody else is at work on it; None if they published it."""
    watch, dead = Watch(), set[str]()
    while not is_published(out):
        try:
            return Workspace.claim(out, new_attempt(), supersedes=dead)
        except Busy as busy:
            dead.update(other.attempt for other in busy.others if other.expired(watch))
        time.sleep(0.05)
    return None


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except GONE as error:
        raise CorruptResult(f"{source} is missing, its manifest lists it") from error
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target, follow_symlinks=False)
