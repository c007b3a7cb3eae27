"""Batches that are ready before they are needed: a thread makes those of the next step while one is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")


class Ahead(Generic[Key, Made]):
    """What a function makes, begun before it is asked for. What goes wrong in it is raised when it is asked for."""

    def __init__(self, make: Callable[[Key], Made]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[Key, Future[Made]] | None = None

    def begin(self, key: Key) -> None:
        """Begins what will be asked for next."""
        self._next = key, self._thread.submit(self._make, key)

    def take(self, key: Key) -> Made:
        """What the function makes of a key, also if another one was begun."""
        begun, self._next = self._next, None
        if begun is not None and begun[0] == key:
            return begun[1].result()
        if begun is not None:
            begun[1].cancel()
        return self._make(key)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
