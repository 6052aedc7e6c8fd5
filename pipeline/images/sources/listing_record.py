"""The record of a long listing: the pages that a store answered, until the plan that is made from them is frozen.

The record lies in the memory, so that an add that was killed while it listed goes on, on any machine. Its listing walks
again through the recorded pages, which decide as they did before what is asked next, and asks the store for the others.
A page costs a tenth of the CPU time that it took from S3, and no request.

A lease holds the folder of a record. Without a lease a record is garbage: after a clean-up the add lists anew.
"""

import contextlib
import datetime
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import VisualMemoryError
from pipeline.images.names.uris import path_of_uri, uri_of_path
from pipeline.images.sources.keys import Page
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, Progress
from pipeline.recent import Recent
from pipeline.store.layout import listing_folder, listing_path, time_of_listing
from pipeline.store.storage.file_refs import UNREADABLE
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.leases import Lease, live_leases, read_leases
from pipeline.store.tables.schemas import write_table

KEYS_A_FILE = 1 << 18  # 26 MB in memory, some 25 bytes for each key in the file
SECONDS_A_FILE = 30.0  # of listing that a kill loses at most; a listing that takes less writes nothing
LONGEST_PAUSE = datetime.timedelta(days=1)  # since the last page of a record: after it, the source is listed anew
BYTES_HELD = 128 << 20  # of pages that are read again

KEYS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64()),
        pa.field("modified", pa.timestamp("us", tz="UTC")),
    ]
)
_PAGES = b"visual_memory.pages"  # in the metadata of a file: its pages, in the order of their keys

logger = plain_logger(__name__)


class PageRequest(NamedTuple):
    """What was asked of a store: the page of a prefix that a token leads to, at any depth or of one folder."""

    is_deep: bool
    prefix: str
    token: str | None

    @property
    def digest(self) -> bytes:
        return hashlib.blake2b(json.dumps(self).encode(), digest_size=16).digest()


class _InFile(NamedTuple):
    """A page in a file of the record: what was asked, and its answer without the keys."""

    request: PageRequest
    num_keys: int
    folders: list[str]
    token: str | None


class _ReadFile(NamedTuple):
    keys: pa.Table
    pages: list[_InFile]
    starts: list[int]


class ListingRecord:
    """The record of one listing of `source` (a uri) in a memory. Any thread may use it.

    `with` ends the lease, and keeps the pages of a listing that failed or was interrupted; `drop` removes them. Without
    `open` nothing is read or written. Nothing is written either while another live process records the same source.
    """

    def __init__(self, storage: Storage, source: str) -> None:
        self.begun: datetime.datetime | None = None  # when the listing that is gone on with was begun
        self._storage = storage
        self._source = source
        self._scheme = source.partition("://")[0].lower()
        self._folder = listing_folder(hashlib.sha256(source.rstrip("/").encode()).hexdigest())
        self._is_open = False
        self._ending = contextlib.ExitStack()
        self._lease: Lease | None = None
        self._unread: list[str] = []
        self._places: dict[bytes, tuple[str, int]] = {}
        self._left: Counter[str] = Counter()  # pages of a file that were not asked for yet
        self._files = Recent[_ReadFile](BYTES_HELD)
        self._reading = threading.Lock()
        self._waiting: list[tuple[_InFile, pa.RecordBatch]] = []
        self._num_waiting = 0
        self._num_written = 0
        self._written_at = time.monotonic()
        self._adding = threading.Lock()
        self._writing = threading.RLock()  # also for the lease

    def __enter__(self) -> "ListingRecord":
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing:
            if self._lease is not None and self._is_open:
                self._write(self._taken())
            self._end()

    def open(self, *, anew: bool) -> None:
        """Look for the pages of a listing that was killed; with `anew` remove them.

        Costs a request if there are none. If the listing ran on another machine, its lease is watched for some seconds.
        """
        with self._not_at_any_price("read"):
            names = [name for name in self._storage.list(self._folder) if time_of_listing(name) is not None]
            if names and self._held() is None:
                return
            times = [when for name in names if (when := time_of_listing(name)) is not None]
            if names and (anew or datetime.datetime.now(datetime.UTC) - max(times) > LONGEST_PAUSE):
                self._storage.remove_folder(self._folder)
            elif names:
                self.begun = min(times)
                self._unread = [f"{self._folder}{name}" for name in names]
            self._written_at = time.monotonic()
            self._is_open = True

    def told(self, on_progress: OnProgress) -> OnProgress:
        """A listener that says with the progress of a listing when it was begun."""
        if self.begun is None:
            return on_progress
        stage = f"listing, going on from {self.begun:%Y-%m-%d %H:%M} UTC"

        def tell(moment: Progress) -> None:
            on_progress(Progress(stage, moment.done, moment.total) if moment.stage == "listing" else moment)

        return tell

    def page(self, request: PageRequest) -> Page | None:
        """The recorded answer, which is given once; None if it was not recorded, or its file is gone or damaged."""
        with self._reading:
            digest = request.digest
            while digest not in self._places and self._unread:
                self._look_into(self._unread.pop(0))
            path, number = self._places.pop(digest, ("", 0))
            file = self._read(path) if path else None
            if file is None:
                return None
            self._left[path] -= 1
            if not self._left[path]:
                self._storage.release(path)
        keys = file.keys.slice(file.starts[number], file.pages[number].num_keys)
        columns = [keys.column(name).to_pylist() for name in KEYS.names]
        start = len(self._scheme) + len("://")
        found = [
            (path_of_uri(uri[start:]), {"Size": size, "LastModified": modified})
            for uri, size, modified in zip(*columns, strict=True)
        ]
        return Page(found, file.pages[number].folders, file.pages[number].token)

    def note(self, request: PageRequest, page: Page) -> None:
        """Record an answer of the store. Writes a file of the pages that wait, if these are many or the last is old."""
        if not self._is_open:
            return
        batch = pa.record_batch(
            [
                pa.array([f"{self._scheme}://{uri_of_path(key)}" for key, _ in page.keys], pa.string()),
                pa.array([about["Size"] for _, about in page.keys], pa.int64()),
                pa.array([about["LastModified"] for _, about in page.keys], pa.timestamp("us", tz="UTC")),
            ],
            schema=KEYS,
        )
        with self._adding:
            self._waiting.append((_InFile(request, len(page.keys), page.folders, page.token), batch))
            self._num_waiting += len(page.keys)
            is_late = time.monotonic() - self._written_at >= SECONDS_A_FILE
        if self._num_waiting >= KEYS_A_FILE or is_late:
            self._write(self._taken())

    def drop(self) -> None:
        """Remove the record: the plan is frozen."""
        with self._writing:
            self._is_open = False
            if self._lease is not None:
                with self._not_at_any_price("removed"):
                    self._storage.remove_folder(self._folder)
            self._end()

    def _held(self) -> Lease | None:
        """The lease on the folder; None if another live process has one. Leases of dead processes are removed."""
        if self._lease is not None:
            return self._lease
        lease = self._ending.enter_context(Lease(self._storage, f"add {self._source}"))
        lease.hold(self._folder)  # before reading other leases: of two processes at once, at least one sees the other
        others = [one for one in read_leases(self._storage) if self._folder in one.holds and one.nonce != lease.nonce]
        if live_leases(self._storage, others):
            self._end()
            return None
        self._storage.delete(record.path for record in others)
        self._lease = lease
        return lease

    def _end(self) -> None:
        self._is_open = False
        self._lease = None
        self._ending.close()

    def _look_into(self, path: str) -> None:
        file = self._read(path)
        if file is not None:
            for number, page in enumerate(file.pages):
                self._places.setdefault(page.request.digest, (path, number))
            self._left[path] = len(file.pages)

    def _read(self, path: str) -> _ReadFile | None:
        try:
            return self._files.get_or_make(path, lambda: self._read_anew(path), lambda file: file.keys.nbytes)
        except (VisualMemoryError, *UNREADABLE) as error:  # the store is asked for these pages again
            logger.warning("a file of the record of a listing cannot be read: %s", error)
            return None

    def _read_anew(self, path: str) -> _ReadFile:
        keys = pq.read_table(self._storage.local_path(path), page_checksum_verification=True)
        keys.validate(full=True)
        rows = json.loads(keys.schema.metadata[_PAGES])
        pages = [_InFile(PageRequest(*request), *answer) for request, *answer in rows]
        starts = [0]
        for page in pages:
            starts.append(starts[-1] + page.num_keys)
        if starts[-1] != len(keys) or keys.schema.remove_metadata() != KEYS:
            raise ValueError(f"{path} has {len(keys)} keys where {starts[-1]} were written")
        return _ReadFile(keys, pages, starts)

    def _taken(self) -> Sequence[tuple[_InFile, pa.RecordBatch]]:
        """The pages that wait to be written; they wait no longer."""
        with self._adding:
            waiting, self._waiting, self._num_waiting = self._waiting, [], 0
            self._written_at = time.monotonic()
            return waiting

    def _write(self, pages: Sequence[tuple[_InFile, pa.RecordBatch]]) -> None:
        """Write a file of the record. If that fails the listing goes on without a record."""
        with self._writing, self._not_at_any_price("written"):
            if not pages or not self._is_open:
                return
            lease = self._held()
            if lease is None:
                return
            rows = json.dumps([page for page, _ in pages]).encode()
            keys = pa.Table.from_batches([batch for _, batch in pages], KEYS.with_metadata({_PAGES: rows}))
            now = datetime.datetime.now(datetime.UTC)
            path = listing_path(self._folder, now, lease.nonce, self._num_written)
            with self._storage.publishing(path) as local:
                write_table(keys, local, max(len(keys), 1))
            self._num_written += 1

    @contextlib.contextmanager
    def _not_at_any_price(self, done: str) -> Iterator[None]:
        try:
            yield
        except (VisualMemoryError, OSError) as error:
            logger.warning("the record of the listing of %s cannot be %s: %s", self._source, done, error)
            with contextlib.suppress(VisualMemoryError, OSError):
                self._end()
