"""What was worked out lately, kept up to a number of bytes, and worked out once for all who ask at the same time."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from pipeline.deadline import look

SECONDS_BETWEEN_LOOKS = 0.05  # at the deadline of whoever waits for another's work

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by their keys, the ones asked for last. To be used from any thread.

    The last one is kept however large it is; of the others as many as fit into `max_bytes`.
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
        """What all of them take."""
        return self._bytes

    def get(self, key: Hashable) -> Value | None:
        """The value of a key, None where it is not kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept[key] = value, _ = self._kept.pop(key)  # the last asked for comes last
            return value

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keep a value of so many bytes."""
        with self._lock:
            self._bytes -= self._kept.pop(key, (None, 0))[1]
            self._kept[key] = value, num_bytes
            self._bytes += num_bytes
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.pop(next(iter(self._kept)))[1]

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def get_or_make(self, key: Hashable, make: Callable[[], Value], num_bytes: Callable[[Value], int]) -> Value:
        """The value of a key, made where it is not kept; who asks while another makes it waits for that.

        Raises TooLate where the deadline of this thread is over first, and whatever `make` raises.
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
            look()  # the other may have failed, or given up: then this one makes it
        try:
            value = make()
            self.put(key, value, num_bytes(value))
        finally:
            with self._lock:
                del self._worked_at[key]
            own.set()
        return value
