"""Leases on unfinished work: a process that writes files which no version names yet holds a lease and renews it.

A lease holds every path that contains its nonce and every path below the folders it names. Each renewal increments a
counter. So another process reads the lease twice to detect whether its holder is alive, without any clock. On the same
machine it checks the process itself, which takes no time.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import DamagedFile, VisualMemoryError
from pipeline.store.layout import LEASES, lease_path, nonce_of
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.processes import Process
from pipeline.store.values import Nonce

BEAT_SECONDS = 5.0
BEATS_MISSED = 3  # after as many beats without a renewal a holder is presumed dead
LOOKS_A_BEAT = 10
LONGEST_BEAT_SECONDS = 60.0  # limits the wait for a holder on another machine to three of these
SHORTEST_BEAT_SECONDS = 0.01


class LeaseRecord(BaseModel):
    """The contents of `leases/NONCE.json`; a file with another nonce than in its name is not a lease."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nonce: Nonce
    work: str
    process: Process
    beat_seconds: float = Field(gt=0, allow_inf_nan=False)
    beat: int = Field(0, ge=0)
    holds: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return lease_path(self.nonce)

    @property
    def watched_seconds(self) -> float:
        """The time between two beats that other processes assume: `beat_seconds` within fixed limits."""
        return min(max(self.beat_seconds, SHORTEST_BEAT_SECONDS), LONGEST_BEAT_SECONDS)

    def covers(self, path: str) -> bool:
        """Whether this lease holds a file."""
        return self.nonce in path or any(path.startswith(folder) for folder in self.holds)

    def __str__(self) -> str:
        return f"{self.work} ({self.process})"


class Lease:
    """A lease of this process, held in a `with` block and renewed by a thread.

    `work` is a short description of the work. Files written under the lease have `nonce` in their names.
    """

    def __init__(self, storage: Storage, work: str, beat_seconds: float = BEAT_SECONDS) -> None:
        self._storage = storage
        self._record = LeaseRecord(
            nonce=secrets.token_hex(8), work=work, process=Process.this(), beat_seconds=beat_seconds
        )
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def nonce(self) -> str:
        return self._record.nonce

    def __enter__(self) -> "Lease":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._lock, contextlib.suppress(VisualMemoryError, OSError):  # others detect that the lease is dead
            self._storage.delete([self._record.path])

    def hold(self, *folders: str) -> None:
        """Hold everything below these folders too."""
        with self._lock:
            holds = tuple(dict.fromkeys((*self._record.holds, *folders)))
            self._record = self._record.model_copy(update={"holds": holds})
            self._write()

    def _renew(self) -> None:
        while not self._ended.wait(self._record.beat_seconds):
            with self._lock:
                if self._ended.is_set():
                    return
                self._record = self._record.model_copy(update={"beat": self._record.beat + 1})
                with contextlib.suppress(VisualMemoryError, OSError):  # tried again at the next beat
                    self._write()

    def _write(self) -> None:
        self._storage.replace(self._record.path, self._record.model_dump_json(indent=1).encode())


def read_leases(storage: Storage) -> list[LeaseRecord]:
    """Every lease, including leases of dead holders."""
    found = (_read(storage, nonce_of(name)) for name in storage.list(LEASES) if name.endswith(".json"))
    return [record for record in found if record is not None]


def live_leases(storage: Storage, records: Iterable[LeaseRecord]) -> list[LeaseRecord]:
    """The leases with a live holder. Takes seconds if a holder on another machine has to be watched."""
    alive, watched = [], []
    for record in records:
        known = record.process.is_alive()
        if known:
            alive.append(record)
        elif known is None:
            watched.append(record)
    deadline = max((BEATS_MISSED * record.watched_seconds for record in watched), default=0.0)
    waited = 0.0
    while watched and waited < deadline:
        pause = min(record.watched_seconds for record in watched) / LOOKS_A_BEAT
        time.sleep(pause)
        waited += pause
        for record in list(watched):
            now = _read(storage, record.nonce)
            if now is None or now.beat != record.beat or waited >= BEATS_MISSED * record.watched_seconds:
                watched.remove(record)
                alive += [record] if now is not None and now.beat != record.beat else []
    return alive


def _read(storage: Storage, nonce: str) -> LeaseRecord | None:
    try:
        record = LeaseRecord.model_validate_json(storage.read(lease_path(nonce)))
    except (DamagedFile, ValidationError):  # ended since it was listed, or not a lease
        return None
    return record if record.nonce == nonce else None
