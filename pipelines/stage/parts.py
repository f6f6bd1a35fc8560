"""Parts of a published folder as results of their own, such as the layers of one pass: they share the files' bytes."""

import errno
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cluster import BadTask, CorruptResult, Manifest, is_published
from cluster.store import verdicts
from cluster.store.layout import GONE, check_out, new_attempt, temporaries
from cluster.store.lease import Marks, Watch
from cluster.store.publish import publish_copy
from cluster.store.workspace import Busy, Workspace


def adopt(src_subfolder: Path, out: Path) -> Manifest:
    """Publish a subfolder of a published folder as a result of its own, in one step.

    So one task can make several results (all layers of one pass) that live on their own afterwards. The files are
    linked, or copied where the file system cannot link. The name of `out` becomes the key, its parent's name the kind;
    a result that is there already is left as it is.

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
    inside = f"{part}/"
    sums = {path.removeprefix(inside): sum_ for path, sum_ in source.sums.items() if path.startswith(inside)}
    if not sums:
        raise BadTask(f"{owner} was published without files in {part!r}")
    about = replace(source.about, key=out.name, kind=out.parent.name, part=part)
    watch = Watch()
    while not is_published(out):
        dead = [attempt for root, _, attempt in temporaries(out.parent, out.name) if watch.abandoned(root)]
        try:
            workspace = Workspace.claim(out, new_attempt(), supersedes=dead)
        except Busy:
            time.sleep(0.05)
        else:
            publish_copy(workspace, about, sums, lambda path, target: _link(src / path, target))
    return Manifest.read(out)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except GONE as error:
        raise CorruptResult(f"{source} is missing, its manifest lists it") from error
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target, follow_symlinks=False)


def remember_linked(read: Mapping[Path, Marks]) -> None:
    """Remember results whose files were read when they had these marks, and were linked or unlinked since.

    That changes their ctime; their size, mtime and inode must still be those of before.
    """
    time.sleep(verdicts.TICK_NS / 1e9)
    for folder, before in read.items():
        now = verdicts.marks(folder)
        but_ctime = [one[:4] for one in now]
        if before and all(one[:4] in but_ctime for one in before):
            verdicts.remember(folder, now)
