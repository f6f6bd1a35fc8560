"""Makes what comes next while the consumer works, in one thread.

Not a DataLoader: that reads ahead in processes only, which would fork a process with threads, copy each batch through
/dev/shm (64 MB in a container) and hold tokens that fit into memory once a process.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def read_ahead(make: Callable[[A], B], items: Iterable[A], depth: int) -> Generator[B]:
    """`make(item)` of each item, in order, up to `depth` of them in advance.

    An exception in making one is raised where it would have come. Closing the generator (leaving its loop early) ends
    the thread.
    """
    with ThreadPoolExecutor(1, "ocvtp-ahead") as thread:
        ahead = deque[Future[B]]()
        try:
            for item in items:
                ahead.append(thread.submit(make, item))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
