"""Finds traces of erased entries in files of any kind. Values that remaining entries also have are not traces.

Each file is read once. Which values other entries share is known only after all entries files were read, so what is
found is kept by value until then.
"""

import json
import os
import re
import shlex
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.edits.erasure.all_versions import Duplicate, EntryFacts
from pipeline.edits.erasure.byte_search import VectorSearch
from pipeline.edits.erasure.receipt import Trace
from pipeline.edits.erasure.values import Values
from pipeline.errors import DamagedFile
from pipeline.store.checks.inventory import Inventory
from pipeline.store.layout import ROLLUP, VERSIONS, folder_at_the_top, kind_of
from pipeline.store.log.sealed import plain_text
from pipeline.store.log.single_adds import encode_vector, vectors_of_singles
from pipeline.store.log.state import State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_refs import UNREADABLE
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.ids import is_in
from pipeline.store.tables.kept_columns import as_text, type_of
from pipeline.store.tables.schemas import embedding_matrix

NUMBERS_AT_ONCE = 1 << 20
THREADS = min(os.cpu_count() or 1, 8)  # files read at once: decompressing and comparing take most of the time

_IDS = re.compile(rb"\d{9,19}")

Value = str | int  # a text; the row of an erased vector; 0 for an id


@dataclass
class InFile:
    """What one file holds of the erased entries.

    `hits` counts values by what they are and where in the file they lie. `like_erased` are the id, uri, hash and vector
    of other entries that share one of the last three. `of_others` are values of kept columns that other rows have.
    `gone` says that the file was not there.
    """

    path: str
    hits: dict[tuple[str, str], Counter[Value]] = field(default_factory=dict)
    like_erased: list[tuple[int, str, str, bytes]] = field(default_factory=list)
    of_others: dict[str, set[str]] = field(default_factory=dict)
    gone: bool = False

    def note(self, what: str, where: str, values: Mapping[Value, int]) -> None:
        """Count values; `what` is "id", "uri", "sha256", "vector" or "kept NAME"."""
        if values:
            self.hits.setdefault((what, where), Counter()).update(values)


class Traces:
    """Looks into files, several threads at once, and collects what they found."""

    def __init__(self, log: VersionLog, state: State, erased: EntryFacts) -> None:
        self._look_for(log.storage, state.weights.path if state.weights else "", erased)
        singles = Inventory.of(log, last=state.version).singles.values()
        self._others = [(s.id, s.uri, s.sha256, vectors_of_singles([s], -1)[0].tobytes()) for s in singles]
        self._in_files: list[InFile] = []
        self._of_others: dict[str, set[str]] = {}
        self.found: list[Trace] = []
        self.duplicates: dict[int, Duplicate] = {}
        self.own_vectors = erased.vectors_ND

    def _look_for(self, storage: Storage, weights: str, erased: EntryFacts) -> None:
        self._storage = storage
        self._weights = weights
        self._erased = erased
        self._ids_N = erased.ids_N
        self._id_set = set(erased.ids_N.tolist())
        self._uris, self._hashes = frozenset(erased.uris), frozenset(erased.hashes)
        self._forms = self._uris | {urllib.parse.unquote(uri) for uri in self._uris}
        self._uri_values, self._hash_values = Values(self._uris), Values(self._hashes)
        self._all_texts = Values(self._forms | self._hashes)
        self._kept = {name: Values(values) for name, values in erased.kept.items()}
        self._vector_texts = {encode_vector(vector) for vector in erased.vectors_ND}
        self._rows_of: dict[bytes, list[int]] = {}
        for row, vector in enumerate(erased.vectors_ND):
            self._rows_of.setdefault(vector.tobytes(), []).append(row)
        self._search = VectorSearch(erased.vectors_ND)

    def __getstate__(self) -> tuple[Storage, str, EntryFacts]:
        """What another process needs to look into files. It makes the tables of values itself."""
        return self._storage, self._weights, self._erased

    def __setstate__(self, state: tuple[Storage, str, EntryFacts]) -> None:
        self._look_for(*state)

    def look_into_all(self, paths: Sequence[str]) -> list[InFile]:
        """`look_into` of several files, some at once."""
        with ThreadPoolExecutor(THREADS) as pool:
            return [*pool.map(self.look_into, paths)]

    def look_into(self, path: str) -> InFile:
        """Read a file and find every value of the erased entries in it. Changes nothing of this object."""
        found = InFile(path)
        if path == self._weights:
            return found  # its name is the hash of the weights' tensors, which do not depend on any image
        try:
            local = self._storage.local_path(path)
        except DamagedFile:
            if self._storage.exists(path):
                raise
            found.gone = True  # deleted after it was listed
            return found
        try:
            return self._looked_into(path, local)
        except FileNotFoundError:  # deleted just now
            found.gone = True
            return found
        finally:
            self._storage.release(path)

    def add(self, found: InFile) -> None:
        """Collect what `look_into` found."""
        self._others += found.like_erased
        for name, values in found.of_others.items():
            self._of_others.setdefault(name, set()).update(values)
        if found.hits:
            self._in_files.append(found)

    def leave_out_what_others_have(self) -> None:
        """Set `found`, `duplicates` and `own_vectors`, once every file was added."""
        own_uris, own_hashes = set(self._uris), set(self._hashes)
        own_N = np.ones(len(self._ids_N), bool)
        for entry_id, uri, sha256, vector in self._others:
            rows = self._rows_of.get(vector, [])
            is_same = {"uri": uri in self._uris, "hash": sha256 in self._hashes, "vector": bool(rows)}
            if entry_id not in self._id_set and any(is_same.values()):
                own_N[rows] = False
                own_uris.discard(uri)
                own_hashes.discard(sha256)
                same = " and ".join(name for name, is_it in is_same.items() if is_it)
                self.duplicates[entry_id] = Duplicate(entry_id, uri, same)
        self.own_vectors = self._erased.vectors_ND[own_N]
        own: dict[str, set[Value]] = {"id": {0}}
        own["uri"] = own["sha256"] = {*own_uris, *map(urllib.parse.unquote, own_uris), *own_hashes}
        own["vector"] = {*np.flatnonzero(own_N).tolist(), *(encode_vector(vector) for vector in self.own_vectors)}
        for name, values in self._erased.kept.items():
            own[f"kept {name}"] = {*(values - self._of_others.get(name, set()))}
        for each in self._in_files:
            for (what, _), counts in each.hits.items():
                if count := sum(number for value, number in counts.items() if value in own[what]):
                    self.found.append(Trace(each.path, what, count))

    def any_held_by(self, covers: Callable[[str], bool]) -> bool:
        """Whether a file that a lease covers holds a trace."""
        return any(covers(found.path) for found in self.found)

    def _looked_into(self, path: str, local: Path) -> InFile:
        with local.open("rb") as stream:
            begin = stream.read(8)
        if begin.startswith((b"PAR1", b"ARROW1")):
            found = InFile(path)
            try:
                for table in _tables_of(local, begin):
                    self._look_into_rows(found, table)
            except FileNotFoundError:
                raise
            except UNREADABLE:  # the file is damaged: search its raw bytes
                pass
            else:
                return found
        found = InFile(path)
        if begin.startswith(b"\x93NUMPY"):
            self._look_into_array(found, local)
        elif path.endswith(".json") or path == ROLLUP:
            data = local.read_bytes()
            self._look_into_text(found, plain_text(data) if folder_at_the_top(path) == VERSIONS else data)
        else:
            self._note_vectors(found, "bytes", self._search.rows_in_file(local))
            if not path.endswith((".faiss", ".f16")):
                self._look_into_text(found, local.read_bytes())
        return found

    def _look_into_rows(self, found: InFile, table: pa.Table) -> None:
        """Search every column, whatever its name."""
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_int64(column.type):
                found.note("id", name, _ids(pc.sum(pc.is_in(column, pa.array(self._ids_N))).as_py()))
            elif pa.types.is_string(column.type):
                found.note("sha256" if name == "sha256" else "uri", name, _counts(column, self._all_texts))
            elif pa.types.is_fixed_size_list(column.type):
                rows = self._search.rows_in(np.ascontiguousarray(embedding_matrix(column)).tobytes())
                self._note_vectors(found, name, rows)
            if type_of(column.type) and name in self._kept:
                found.note(f"kept {name}", name, _counts(as_text(column), self._kept[name]))
        kind = kind_of(found.path)
        if kind == "entries":
            found.like_erased += self._like_erased(table)
        if kind in ("entries", "plan") and (names := self._kept.keys() & {*table.column_names}):
            others = table.filter(pa.array(~is_in(table.column("id").to_numpy(), self._ids_N)))
            for name in names:
                same = _counts(as_text(others.column(name)), self._kept[name])
                found.of_others.setdefault(name, set()).update(map(str, same))

    def _like_erased(self, table: pa.Table) -> Iterator[tuple[int, str, str, bytes]]:
        """The id, uri, hash and vector of rows that share a uri, hash or vector with an erased entry."""
        same_uri = self._uri_values.found_in(table.column("uri"))
        same_N = pc.or_(same_uri, self._hash_values.found_in(table.column("sha256"))).to_numpy()
        vectors_ND = np.ascontiguousarray(embedding_matrix(table.column("embedding")))
        if self._search.rows_in(vectors_ND.tobytes()):
            same_N = same_N | np.array([vector.tobytes() in self._rows_of for vector in vectors_ND], bool)
        for row in np.flatnonzero(same_N).tolist():
            entry_id, uri, sha256 = (table.column(name)[row].as_py() for name in ("id", "uri", "sha256"))
            yield entry_id, uri, sha256, vectors_ND[row].tobytes()

    def _look_into_array(self, found: InFile, local: Path) -> None:
        try:
            array = np.load(local, mmap_mode="r", allow_pickle=False).reshape(-1)
        except FileNotFoundError:
            raise
        except UNREADABLE:  # the file is damaged, or empty: search its raw bytes
            array = np.empty(0, np.float16)
        if array.dtype.kind in "iu":
            starts = range(0, len(array), NUMBERS_AT_ONCE)
            count = sum(int(np.isin(array[at : at + NUMBERS_AT_ONCE], self._ids_N).sum()) for at in starts)
            found.note("id", "numbers", _ids(count))
        else:
            self._note_vectors(found, "numbers", self._search.rows_in_file(local))

    def _look_into_text(self, found: InFile, data: bytes) -> None:
        found.note("id", "text", _ids(sum(int(number) in self._id_set for number in _IDS.findall(data))))
        strings = set(_strings(data.decode("utf-8", errors="replace")))
        found.note("uri", "text", dict.fromkeys(strings & self._forms, 1))
        found.note("sha256", "text", dict.fromkeys(strings & self._hashes, 1))
        found.note("vector", "text", dict.fromkeys(strings & self._vector_texts, 1))

    def _note_vectors(self, found: InFile, where: str, rows: list[int]) -> None:
        known = found.hits.get(("vector", where), Counter())
        found.note("vector", where, {row: 1 for row in rows if row not in known})


def _ids(count: int | None) -> Mapping[Value, int]:
    return {0: count} if count else {}


def _counts(column: pa.ChunkedArray, values: Values) -> dict[Value, int]:
    """How often each of the values occurs in a column of texts."""
    pairs = pc.value_counts(column.filter(values.found_in(column))).to_pylist()
    return {pair["values"]: pair["counts"] for pair in pairs}


def _tables_of(local: Path, begin: bytes) -> Iterator[pa.Table]:
    """The rows of a Parquet or Arrow file, one row group or batch at a time. Raises UNREADABLE for a damaged file."""
    if begin.startswith(b"PAR1"):
        with pq.ParquetFile(local) as parquet:
            for group in range(parquet.num_row_groups):
                yield _validated(parquet.read_row_group(group))
    else:
        with pa.memory_map(str(local)) as mapped, pa.ipc.open_file(mapped) as batches:
            for number in range(batches.num_record_batches):
                yield _validated(pa.Table.from_batches([batches.get_batch(number)]))


def _validated(table: pa.Table) -> pa.Table:
    table.validate(full=True)
    return table


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
