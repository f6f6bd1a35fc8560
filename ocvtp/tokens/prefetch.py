"""Work ahead of the consumer in one background thread."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int) -> Generator[T]:
    """The same items in the same order, up to `depth` of them made in advance; 0 makes none.

    An exception in making an item is raised where that item would have come. Closing the generator (leaving its loop
    early) ends the thread.
    """
    if depth < 1:
        yield from items
        return
    ready: queue.Queue[tuple[str, T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, item: T | None, error: BaseException | None = None) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
        except BaseException as error:
            put("error", None, error)
        else:
            put("end", None)

    thread = threading.Thread(target=work, name="ocvtp-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, item, error = ready.get()
            if error is not None:
                raise error
            if kind == "end":
                return
            yield item  # type: ignore[misc]  # None only beside "end" or an error
    finally:
        stop.set()
        thread.join()
