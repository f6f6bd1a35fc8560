"""The workspace of one attempt, and how attempts at one result follow each other.

An attempt is fenced by renaming its folder: from then on none of its paths exist. Publication is a rename from
inside that folder, so it fails from then on: fencing needs no check that could come too late.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

from cluster.errors import Fenced, StoreUnavailable
from cluster.host import Process
from cluster.store import lease as leases
from cluster.store.layout import GONE, RESULT, RESUME, files_in, patient, temporaries, temporary
from cluster.store.lease import OWNER_FILE, Owner, read_owner, replace_owner

log = logging.getLogger(__name__)

DECISION = 1.0  # seconds to wait for another claim of the same instant


class Busy(Exception):
    """Others are at work on the same result, or may be."""


class Workspace:
    """The temporary folder of one attempt; `folder` is what the call writes to."""

    def __init__(self, out: Path, attempt: str, owner: Owner) -> None:
        self.out, self.attempt = out, attempt
        self.root = temporary(out, attempt)
        self.folder = self.root / RESULT
        self.lost = False
        self._owner = owner
        self._pin: int | None = None  # open handle of `root`: a folder made anew under its name is another one

    @classmethod
    @patient
    def claim(cls, out: Path, attempt: str, *, supersedes: Collection[str] = (), lease: float = 60.0) -> Self:
        """Fence dead attempts, and those in `supersedes`, and take over their `resume/`. Of several, one gets it.

        Raises:
            Busy: others are at work, or may be; nothing was changed.
            Fenced: another attempt took over before this one had begun.
            StoreUnavailable: the file system failed for longer than it was waited for.
        """
        self = cls(out, attempt, Owner(Process.me(), lease))
        try:
            while not self._begin():
                pass
            stale = self._decide(supersedes)
            self.folder.mkdir(exist_ok=True)
            _take_over(stale, self)
            self._owner = replace(self._owner, beat=1, resume_at_start=leases.signature(self.folder / RESUME))
            replace_owner(self.root, self._owner)
        except BaseException as error:
            try:
                if isinstance(error, FileNotFoundError):
                    self.check()
            finally:
                self.discard()
            raise
        return self

    def _begin(self) -> bool:
        """Make the folder and say whose it is; False if it was swept in between, since nobody's was empty."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.root.mkdir(exist_ok=True)  # of a try that the file system failed: the name is ours alone
            self._pin = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            (self.root / OWNER_FILE).write_text(json.dumps(asdict(self._owner)))
        except FileNotFoundError:
            self.discard()
            return False
        return True

    def _decide(self, supersedes: Collection[str]) -> list[Path]:
        """Attempts that are over, once it is sure that no other is at work; raises Busy if one is.

        Our folder was made before we look, so of two claims at least one sees the other. The one of the lower name
        waits until the other has decided, and the other gives way.
        """
        deadline = time.monotonic() + DECISION
        while True:
            stale, beats = list[Path](), dict[str, int]()  # folders of attempts that are over; those that may not be
            for root, _, attempt in temporaries(self.out.parent, self.out.name):
                owner = read_owner(root)
                if attempt == self.attempt:
                    continue
                if attempt in supersedes or (owner is not None and owner.alive() is False):
                    stale.append(root)
                elif owner is not None or not leases.remove_empty(root):
                    beats[attempt] = -1 if owner is None else owner.beat
            if not beats:
                return stale
            gives_way = any(beat > 0 or attempt < self.attempt for attempt, beat in beats.items())
            if gives_way or time.monotonic() > deadline:
                raise Busy(f"{len(beats)} other attempt(s) at work")
            time.sleep(0.01)

    def beat(self) -> bool:
        """Renew the lease; False, for ever, once it is lost."""
        self._owner = replace(self._owner, beat=self._owner.beat + 1)
        try:
            self.check()
            replace_owner(self.root, self._owner)
        except (Fenced, *GONE):
            self.lost = True
        except (OSError, StoreUnavailable) as error:  # must not end an attempt that writes nothing just now
            log.warning("cannot renew the lease of %s: %s", self.root, error)
        return not self.lost

    @contextlib.contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Renew the lease four times a lease, in a thread of its own."""
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(self._owner.lease / 4) and self.beat():
                pass

        thread = threading.Thread(target=work, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def check(self) -> None:
        """Raise `Fenced` if the lease is lost: the folder is gone, or another one; `StoreUnavailable` if none can tell.

        A call that makes its folders as it needs them may have made the fenced one again: that one does not count.
        """
        try:
            here = patient(os.stat)(self.root)
            self.lost |= self._pin is None or not os.path.samestat(patient(os.fstat)(self._pin), here)
        except GONE:
            self.lost = True
        if self.lost:
            raise Fenced(f"another attempt took over {self.out}: this one (of {self._owner.process}) must end")

    def discard(self) -> None:
        """Remove this attempt, all but a `resume/` that holds something."""
        leases.discard(self.root)
        if self._pin is not None:
            os.close(self._pin)
            self._pin = None


def _take_over(stale: list[Path], workspace: Workspace) -> None:
    """Fence each stale attempt by renaming it, and move the fullest `resume/` among them here."""
    fenced = []
    for root in stale:
        target = temporary(workspace.out)
        with contextlib.suppress(*GONE):  # it ended, published or was swept in the meantime
            root.rename(target)
            replace_owner(target, replace(workspace._owner, released=True))
            fenced.append(target)
    resumes = [found for root in fenced if (found := leases.resume_of(root)) is not None]
    if resumes:
        fullest = max(resumes, key=lambda found: sum(file.lstat().st_size for file in files_in(found)))
        fullest.rename(workspace.folder / RESUME)
    for root in fenced:
        leases.remove(root)
