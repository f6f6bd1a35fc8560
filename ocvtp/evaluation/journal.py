"""A journal of answers, so that a run that is killed loses one batch at most.

Lines of JSON, each behind its own checksum, forced to disk batch by batch. The first says what makes the answers; a
journal is only ever gone on with by what makes the same. One process at a time writes a journal.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput, Incompatible
from ocvtp.evaluation.answered import Answered

log = logging.getLogger(__name__)
_FITS = "fits"
_DIGITS = 16
"""Hexadecimal digits of a line's checksum."""
PATIENCE = 10.0
"""Seconds that a process waits for another one to let go of its journal: one that is being killed does soon."""


class Journal:
    """Answers of earlier runs in `known`, by row; `add` keeps more.

    Attributes:
        path: of its file.
        known: by row.
        fits: questions at once that there was memory for; None as long as there was for all.
    """

    def __init__(self, path: Path, known: Mapping[int, Answered], fits: int | None = None) -> None:
        self.path, self.known, self.fits = path, dict(known), fits

    def add(self, answered: Sequence[Answered]) -> None:
        """Append answers; they are on disk when it returns."""
        self._append([one.to_dict() for one in answered])
        self.known |= {one.row: one for one in answered}

    def note_fit(self, batch_size: int) -> None:
        """Append how many questions there is memory for at once, so that no later run tries more."""
        self._append([{_FITS: batch_size}])
        self.fits = batch_size

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("ab") as file:
            file.write(b"".join(map(_line, lines)))
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def opened(path: Path, made_by: Mapping[str, Any], patience: float = PATIENCE) -> Iterator[Journal]:
    """The journal of a file, begun if it is not there; ours alone within the `with`.

    What a kill cut off at its end is dropped. Any other damaged line is dropped with a warning: its question is asked
    again.

    Args:
        path: of the file; `<path>.lock` lies beside it.
        made_by: all that determines the answers, as JSON.
        patience: seconds to wait for another process that has it open.

    Raises:
        Incompatible: it holds answers that something else made; names what differs.
        BadInput: another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("wb") as lock:
        _take(lock, path, patience)
        header = json.loads(json.dumps({"made_by": made_by}))
        found, whole = _read(path)
        if not found:
            _rewrite(path, [header])
            yield Journal(path, {})
            return
        if found[0] != header:
            raise Incompatible(_differing(path, found[0], header))
        known, fits = dict[int, Answered](), None
        for line in found[1:]:
            try:
                if isinstance(line, dict) and _FITS in line:
                    fits = int(line[_FITS])
                    continue
                known[int(line["row"])] = Answered.from_dict(line)
            except (ValueError, KeyError, TypeError):
                whole = False
                log.warning("%s has a line that is no answer: it is dropped", path)
        if not whole:
            noted = [] if fits is None else [{_FITS: fits}]
            _rewrite(path, [header, *noted, *(one.to_dict() for one in known.values())])
        yield Journal(path, known, fits)


def _take(lock: Any, path: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise BadInput(f"another process is writing {path}: let it finish, or give another folder") from None
            time.sleep(0.1)
        else:
            return


def _read(path: Path) -> tuple[list[Any], bool]:
    """What the sound lines say, and whether all are sound."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], True
    *lines, torn = data.split(b"\n")
    found: list[Any] = []
    for number, line in enumerate(lines, start=1):
        if _is_sound(line):
            found.append(json.loads(line[_DIGITS + 1 :]))
        elif number == 1:
            log.warning("%s begins with a damaged line, so that nothing says what made it: it is begun anew", path)
            return [], False
        else:
            log.warning("%s, line %d is damaged: it is dropped, and its question asked again", path, number)
    return found, not torn and len(found) == len(lines)


def _is_sound(line: bytes) -> bool:
    return line[: _DIGITS + 1] == _sum(line[_DIGITS + 1 :]) + b" "


def _sum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGITS].encode()


def _line(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":")).encode()
    return _sum(text) + b" " + text + b"\n"


def _rewrite(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """The file anew, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(b"".join(map(_line, lines)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _differing(path: Path, there: Any, ours: Mapping[str, Any]) -> str:
    one = there.get("made_by", {}) if isinstance(there, dict) else {}
    other = ours["made_by"]
    names = sorted(_paths(one, other)) or ["everything"]
    return f"{path} holds answers that something else made ({', '.join(names)}): give another folder, or remove it"


def _paths(one: Any, other: Any) -> Iterator[str]:
    for name in {*one, *other}:
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from (f"{name}.{inner}" for inner in _paths(mine, theirs))
        elif mine != theirs:
            yield name
