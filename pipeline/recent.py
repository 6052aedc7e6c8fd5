"""A cache of recent results, limited in bytes. Concurrent callers for one key wait for a single computation."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from pipeline.deadline import look

SECONDS_BETWEEN_LOOKS = 0.05  # at the deadline, while waiting for another thread's result

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The most recently used values by key. Any thread may use it.

    The last value always stays in the cache, even if it is larger than `max_bytes`. Older ones stay while they fit.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[Hashable, tuple[Value, int]] = {}
        self._bytes = 0
        self._worked_at: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """The size of all values in the cache."""
        return self._bytes

    def get(self, key: Hashable) -> Value | None:
        """The value of a key; None if it is not in the cache."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept[key] = value, _ = self._kept.pop(key)  # the last used comes last
            return value

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Put a value of `num_bytes` into the cache."""
        with self._lock:
            self._bytes -= self._kept.pop(key, (None, 0))[1]
            self._kept[key] = value, num_bytes
            self._bytes += num_bytes
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.pop(next(iter(self._kept)))[1]

    def items(self) -> list[tuple[Hashable, Value, int]]:
        """The keys with their values and sizes, the last used last."""
        with self._lock:
            return [(key, value, num_bytes) for key, (value, num_bytes) in self._kept.items()]

    def clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def get_or_make(self, key: Hashable, make: Callable[[], Value], num_bytes: Callable[[Value], int]) -> Value:
        """The value of a key, made if it is not in the cache. If another thread is making it, this one waits for it.

        Raises TooLate if the deadline of this thread is over first, and any error that `make` raises.
        """
        while True:
            value = self.get(key)
            if value is not None:
                return value
            with self._lock:
                made = self._worked_at.get(key)
                if made is None:
                    own = self._worked_at[key] = threading.Event()
                    break
            while not made.wait(SECONDS_BETWEEN_LOOKS):
                look()
            look()  # the other thread may have failed or given up: then this one makes the value
        try:
            value = make()
            self.put(key, value, num_bytes(value))
        finally:
            with self._lock:
                del self._worked_at[key]
            own.set()
        return value
