"""Proves that entries are forgotten, and reports what was searched and what was found.

Every file of the memory is read again, decoded if its format is known, and searched for ids, uris, hashes, vectors and
values of kept columns. The forgotten vectors are used as queries under every voting. The proof does not rely on the
erasure's own record of its work.
"""

import datetime
import io
import json
import re
import shlex
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.edits.erasure.all_versions import Duplicate, EntryFacts
from pipeline.edits.erasure.byte_search import VectorSearch, quantizer_holds
from pipeline.edits.erasure.erase import ErasureReport
from pipeline.edits.erasure.receipt import Receipt, Trace
from pipeline.edits.erasure.redact import work_on_erased
from pipeline.errors import DamagedFile
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.checks.inventory import Inventory
from pipeline.store.layout import kind_of
from pipeline.store.log.single_adds import encode_vector, vectors_of_singles
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import UNREADABLE
from pipeline.store.storage.leases import live_leases, read_leases
from pipeline.store.tables.kept_columns import as_text, type_of
from pipeline.store.tables.schemas import embedding_matrix

_IDS = re.compile(rb"\d{9,19}")


def prove(
    log: VersionLog,
    state: State,
    erased: EntryFacts,
    asked: Mapping[str, Any],
    answers: Mapping[str, Any],
    report: ErasureReport | None,
    on_progress: OnProgress = ignore_progress,
) -> Receipt:
    """Search every file for traces of the forgotten entries.

    `answers` is the result of querying their vectors (asking.ask_about_forgotten). `report` is None if nothing was
    erased.
    """
    files = log.storage.walk()
    traces = _Traces(log, state, erased)
    traces.note_duplicates([path for path in files if kind_of(path) == "entries"])
    traces.note_kept_by_others([path for path in files if kind_of(path) in ("entries", "plan")])
    for done, path in enumerate(sorted(files)):
        on_progress(Progress("proving", done, len(files)))
        traces.look_into(path)
    on_progress(Progress("proving", len(files), len(files)))
    work = live_leases(
        log.storage, [record for record in read_leases(log.storage) if traces.any_held_by(record.covers)]
    )
    under_way = {*work_on_erased(log.storage, erased.uris), *map(str, work)}
    columns = zip(erased.ids_N.tolist(), erased.uris, erased.hashes, erased.labels, erased.datasets, strict=True)
    names = ("id", "uri", "sha256", "label", "dataset")
    return Receipt(
        memory=log.storage.uri,
        version=state.version,
        written_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        asked=asked,
        entries=[dict(zip(names, row, strict=True)) for row in columns],
        erased=report is not None,
        files_rewritten=report.rewritten if report else (),
        files_removed=len(report.removed) if report else 0,
        versions_redacted=report.redacted if report else 0,
        answers=answers,
        files_scanned=len(files),
        bytes_scanned=sum(files.values()),
        found=traces.found,
        live_duplicates=[*traces.duplicates.values()],
        quantizer=_quantizer(log, state, traces.own_vectors),
        noncurrent_versions=tuple(log.storage.noncurrent()),
        work_under_way=sorted(under_way),
    )


class _Traces:
    """Finds traces of the erased entries in files. Values that remaining entries also have are not traces."""

    def __init__(self, log: VersionLog, state: State, erased: EntryFacts) -> None:
        self._log = log
        self._state = state
        self._erased = erased
        self._ids = pa.array(erased.ids_N)
        self._id_set = set(erased.ids_N.tolist())
        self._uris, self._hashes = frozenset(erased.uris), frozenset(erased.hashes)
        self._rows_of: dict[bytes, list[int]] = {}
        for row, vector in enumerate(erased.vectors_ND):
            self._rows_of.setdefault(vector.tobytes(), []).append(row)
        self._own_kept = {name: set(values) for name, values in erased.kept.items()}
        self.found: list[Trace] = []
        self.duplicates: dict[int, Duplicate] = {}

    def note_duplicates(self, paths: Sequence[str]) -> None:
        """Find the remaining entries that share a uri, hash or vector with the erased ones.

        Shared values are then not searched for, so call this before `look_into`.
        """
        own_uris, own_hashes = set(self._uris), set(self._hashes)
        own_N = np.ones(len(self._erased.ids_N), bool)
        search = VectorSearch(self._erased.vectors_ND)
        singles = Inventory.of(self._log, last=self._state.version).singles.values()
        others = [(s.id, s.uri, s.sha256, vectors_of_singles([s], -1)[0].tobytes()) for s in singles]
        for table in filter(None, map(self._table_in, paths)):
            others += self._like_erased(table, search)
        for entry_id, uri, sha256, vector in others:
            rows = self._rows_of.get(vector, [])
            is_same = {"uri": uri in self._uris, "hash": sha256 in self._hashes, "vector": bool(rows)}
            if entry_id not in self._id_set and any(is_same.values()):
                own_N[rows] = False
                own_uris.discard(uri)
                own_hashes.discard(sha256)
                same = " and ".join(name for name, is_it in is_same.items() if is_it)
                self.duplicates[entry_id] = Duplicate(entry_id, uri, same)
        self.own_vectors = self._erased.vectors_ND[own_N]
        self._own_uris = own_uris | {urllib.parse.unquote(uri) for uri in own_uris}
        self._own_hashes = own_hashes
        self._own_texts = {encode_vector(vector) for vector in self.own_vectors}
        self._search = VectorSearch(self.own_vectors)

    def note_kept_by_others(self, paths: Sequence[str]) -> None:
        """Exclude values of kept columns that any other row has in the same column."""
        for table in filter(None, map(self._table_in, paths if self._own_kept else ())):
            others = table.filter(pc.invert(pc.is_in(table.column("id"), self._ids)))
            for name in self._own_kept.keys() & {*table.column_names}:
                self._own_kept[name] -= set(as_text(others.column(name)).unique().to_pylist())

    def look_into(self, path: str) -> None:
        """Read a file and record the traces in it."""
        if path == (self._state.weights.path if self._state.weights else ""):
            return  # its name is the hash of the weights' tensors, which do not depend on any image
        data = self._read(path)
        table = _as_table(data)
        if table is not None:
            self._look_into_rows(path, table)
        elif data.startswith(b"\x93NUMPY"):
            self._look_into_array(path, data)
        elif path.endswith(".json"):
            self._look_into_text(path, data)
        else:
            self._look_for_vectors(path, data)
            if not path.endswith((".faiss", ".f16")):
                self._look_into_text(path, data)

    def any_held_by(self, covers: Callable[[str], bool]) -> bool:
        """Whether a file that a lease covers holds a trace."""
        return any(covers(found.path) for found in self.found)

    def _read(self, path: str) -> bytes:
        """The bytes of a file; empty if it was deleted after it was listed."""
        try:
            return self._log.storage.read(path)
        except DamagedFile:
            if self._log.storage.exists(path):
                raise
            return b""

    def _table_in(self, path: str) -> pa.Table | None:
        return _as_table(self._read(path))

    def _like_erased(self, table: pa.Table, search: VectorSearch) -> Iterator[tuple[int, str, str, bytes]]:
        """The id, uri, hash and vector of rows that share a uri, hash or vector with an erased entry."""
        vectors_ND = np.ascontiguousarray(embedding_matrix(table.column("embedding")))
        same_N = pc.or_(
            pc.is_in(table.column("uri"), pa.array(sorted(self._uris), pa.string())),
            pc.is_in(table.column("sha256"), pa.array(sorted(self._hashes), pa.string())),
        ).to_numpy()
        if search.rows_in(vectors_ND.tobytes()):
            same_N = same_N | np.array([vector.tobytes() in self._rows_of for vector in vectors_ND], bool)
        for row in np.flatnonzero(same_N).tolist():
            entry_id, uri, sha256 = (table.column(name)[row].as_py() for name in ("id", "uri", "sha256"))
            yield entry_id, uri, sha256, vectors_ND[row].tobytes()

    def _look_into_rows(self, path: str, table: pa.Table) -> None:
        """Search every column, whatever its name."""
        strings = pa.array(sorted(self._own_uris | self._own_hashes), pa.string())
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_int64(column.type):
                self._note(path, "id", pc.sum(pc.is_in(column, self._ids)).as_py() or 0)
            elif pa.types.is_string(column.type):
                what = "sha256" if name == "sha256" else "uri"
                self._note(path, what, pc.sum(pc.is_in(column, strings)).as_py() or 0)
            elif pa.types.is_fixed_size_list(column.type):
                self._look_for_vectors(path, np.ascontiguousarray(embedding_matrix(column)).tobytes())
            if type_of(column.type) and (own := self._own_kept.get(name)):
                values = pa.array(sorted(own), pa.string())
                self._note(path, f"kept {name}", pc.sum(pc.is_in(as_text(column), values)).as_py() or 0)

    def _look_into_array(self, path: str, data: bytes) -> None:
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except UNREADABLE:  # the file is damaged: search its raw bytes
            array = np.empty(0, np.float16)
        if array.dtype.kind in "iu":
            self._note(path, "id", int(np.isin(array, self._erased.ids_N).sum()))
        else:
            self._look_for_vectors(path, data)

    def _look_into_text(self, path: str, data: bytes) -> None:
        self._note(path, "id", sum(int(found) in self._id_set for found in _IDS.findall(data)))
        strings = set(_strings(data.decode("utf-8", errors="replace")))
        self._note(path, "uri", len(strings & self._own_uris))
        self._note(path, "sha256", len(strings & self._own_hashes))
        self._note(path, "vector", len(strings & self._own_texts))

    def _look_for_vectors(self, path: str, data: bytes) -> None:
        self._note(path, "vector", len(self._search.rows_in(data)))

    def _note(self, path: str, what: str, count: int) -> None:
        if count:
            self.found.append(Trace(path, what, count))


def _as_table(data: bytes) -> pa.Table | None:
    """The rows of a Parquet or Arrow file, detected by its first bytes; None for other and for damaged files."""
    try:
        if data.startswith(b"PAR1"):
            table = pq.read_table(io.BytesIO(data))
        elif data.startswith(b"ARROW1"):
            table = pa.ipc.open_file(data).read_all()
        else:
            return None
        table.validate(full=True)
    except UNREADABLE:
        return None
    return table


def _quantizer(log: VersionLog, state: State, own_vectors_ND: np.ndarray) -> dict[str, Any] | None:
    if state.index is None or state.index.trained is None:
        return None
    held = quantizer_holds(log.storage, state.index.trained, own_vectors_ND)
    return {
        "key": state.index.key,
        "path": state.index.trained.path,
        "holds_a_vector": held,
        "remains": "its centroids are averages over the vectors it was trained with, perhaps over these too; no vector "
        "stands in it as it was; `index --rebuild` trains one without them"
        if not held
        else "one of the vectors stands in it as a centroid: run `index --rebuild`",
    }


def _strings(text: str) -> list[str]:
    """Every string of a JSON document and the words of strings with several; for other text, its words."""
    try:
        document = json.loads(text)
    except ValueError:
        return text.split()
    found: list[str] = []
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            found.append(value)
            if len(words := value.split()) > 1:
                found += words + _words_of_a_shell(value)
        elif isinstance(value, Mapping):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            todo += value
    return found


def _words_of_a_shell(text: str) -> list[str]:
    """The words of a shell command, and the text after "=" in each."""
    try:
        words = shlex.split(text)
    except ValueError:  # no closing quotation: the text is not a command
        return []
    return words + [word.partition("=")[2] for word in words]
