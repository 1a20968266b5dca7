"""Work on tensors, or on pieces of them, in a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from reshard.errors import ReshardError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], object], items: Iterable[Item], threads: int) -> None:
    """Work on every item; raises the error of the first, in their order, that has one.

    Items are taken as threads become free, so `items` may be made on the way.
    """
    numbered = enumerate(items)
    taking = threading.Lock()
    failures: dict[int, ReshardError] = {}
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with taking:
                taken = next(numbered, None)
            if taken is None:
                return
            place, item = taken
            try:
                work(item)
            except ReshardError as error:
                failures[place] = error
                stop.set()

    with ThreadPoolExecutor(threads, thread_name_prefix="reshard") as pool:
        try:
            for future in [pool.submit(run) for _ in range(threads)]:
                future.result()
        finally:
            stop.set()  # after Ctrl-C the pool waits for its threads
    if failures:
        # Items are taken in order, and every item that was begun was finished.
        raise failures[min(failures)]


def each(
    items: Sequence[Item],
    look: Callable[[Item], Result],
    threads: int,
    heard: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """What `look` returns for each item, in their order; `heard` is told how many are done."""
    results: dict[int, Result] = {}
    counting = threading.Lock()

    def work(numbered: tuple[int, Item]) -> None:
        number, item = numbered
        result = look(item)
        with counting:
            results[number] = result
            if heard is not None:
                heard(len(results), len(items))

    in_order(work, enumerate(items), threads)
    return [results[number] for number in range(len(items))]
