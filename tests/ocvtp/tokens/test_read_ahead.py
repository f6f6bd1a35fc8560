"""What comes next is made while the consumer works: in order, only so far, and never after its end."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ocvtp.tokens.read_ahead import read_ahead


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ocvtp-ahead")]


@pytest.mark.parametrize("depth", [0, 1, 4, 100])
def test_the_order_is_kept_and_errors_come_where_they_belong(depth: int) -> None:
    assert list(read_ahead(lambda i: -i, range(20), depth)) == [-i for i in range(20)]
    assert list(read_ahead(lambda _: None, range(3), depth)) == [None] * 3

    def make(i: int) -> float:
        return 1 / (2 - i)

    items = read_ahead(make, range(20), depth)
    assert [next(items), next(items)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert threads() == []


def test_it_works_ahead_but_only_so_far() -> None:
    made: list[int] = []
    items = read_ahead(made.append, range(100), 3)
    next(items)
    wait_for(lambda: len(made) == 4)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one taken, three ready
    items.close()
    assert (made, threads()) == ([0, 1, 2, 3], [])


def test_who_leaves_early_waits_for_the_one_in_the_making_alone() -> None:
    begun, go_on = threading.Event(), threading.Event()
    made: list[int] = []

    def make(i: int) -> int:
        if i == 1:
            begun.set()
            go_on.wait(5)
        made.append(i)
        return i

    items = read_ahead(make, range(100), 3)
    assert next(items) == 0
    assert begun.wait(5)
    threading.Timer(0.1, go_on.set).start()
    items.close()
    assert (made, threads()) == ([0, 1], [])


def test_endless_items_will_do() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    items = read_ahead(lambda one: one, endless(), 2)
    assert [next(items) for _ in range(5)] == [1] * 5
    items.close()
    assert threads() == []
