"""The proof that something is forgotten: what was looked for, where, and what was found.

Every file of the memory is read anew, decoded where its format is known, and searched for ids, uris, hashes and
vectors; the forgotten vectors themselves are asked about under every voting. Nothing here relies on what the erasure
believes to have done.
"""

import base64
import datetime
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.edits.erase import ErasureReport, working_on_erased
from pipeline.edits.everything import Facts, kind_of
from pipeline.index.shards import find_rows, holds_any_vector
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.schemas import embedding_matrix
from pipeline.store.singles import encoded_vector
from pipeline.store.state import Single, State
from pipeline.store.versions import VersionLog

_IDS = re.compile(rb"\d{9,19}")


@dataclass(frozen=True)
class Found:
    """Something forgotten that still stands in a file: an id, a uri, a hash or a vector."""

    path: str
    what: str
    count: int


@dataclass(frozen=True)
class Duplicate:
    """A live entry that has the uri, the hash or the vector of a forgotten one, and is not forgotten itself."""

    id: int
    uri: str
    same: str


@dataclass(frozen=True)
class Receipt:
    """What was asked, what was done and what was seen. `proven` says that nothing was found that should not be."""

    memory: str
    version: int
    written_at: str
    asked: Mapping[str, Any]
    entries: Sequence[Mapping[str, Any]]
    erased: bool
    files_rewritten: Sequence[str]
    files_removed: int
    versions_redacted: int
    answers: Mapping[str, Any]
    files_scanned: int
    bytes_scanned: int
    found: Sequence[Found]
    live_duplicates: Sequence[Duplicate]
    quantizer: Mapping[str, Any] | None
    noncurrent_versions: Sequence[str]
    work_under_way: Sequence[str]

    @property
    def proven(self) -> bool:
        """For what was asked: of an erasure the bytes too, of forgetting alone the answers."""
        gone = not (self.found or self.noncurrent_versions or self.work_under_way)
        return not self.answers["returned"] and (gone or not self.erased)

    def to_json(self) -> dict:
        return {"proven": self.proven, **asdict(self)}

    def to_text(self) -> str:
        """The receipt to be read by people."""
        verb = "erased" if self.erased else "forgotten"
        lines = [
            f"Receipt: {len(self.entries):,} entries {verb} from {self.memory}",
            f"written {self.written_at} for version {self.version}",
            "",
            f"asked       {json.dumps(self.asked, ensure_ascii=False)}",
            f"proven      {'yes' if self.proven else 'NO'}",
            "",
            f"answers     {self.answers['queries']:,} of their own vectors asked, k = {self.answers['k']}, under "
            f"{', '.join(self.answers['votings'])}: {self.answers['returned']:,} forgotten entries came back",
            f"files       {self.files_scanned:,} files with {self.bytes_scanned:,} bytes searched for ids, uris, "
            "hashes and vectors",
        ]
        lines += [f"  found     {found.count:,} x {found.what} in {found.path}" for found in self.found]
        if not self.erased:
            lines.append("  note      forgotten, not erased: the bytes stay until `forget --erase`")
        elif not self.found:
            lines.append("  found     nothing")
        if self.erased:
            lines.append(
                f"rewritten   {len(self.files_rewritten):,} files; {self.files_removed:,} removed; "
                f"{self.versions_redacted:,} versions redacted"
            )
        for duplicate in self.live_duplicates:
            lines.append(f"duplicate   entry {duplicate.id} ({duplicate.uri}) has the same {duplicate.same}, and stays")
        if self.quantizer:
            lines.append(f"quantizer   {self.quantizer['key']}: {self.quantizer['remains']}")
        lines += [f"noncurrent  {path}" for path in self.noncurrent_versions]
        lines += [f"under way   {work}: prove it again when that is done" for work in self.work_under_way]
        lines += ["", "entries"]
        lines += [f"  {entry['id']}  {entry['uri']}  {entry['label'] or '(no label)'}" for entry in self.entries]
        return "\n".join(lines) + "\n"


def prove(
    log: VersionLog,
    state: State,
    erased: Facts,
    asked: Mapping[str, Any],
    answers: Mapping[str, Any],
    report: ErasureReport | None,
    on_progress: OnProgress = ignore_progress,
) -> Receipt:
    """Look for what was forgotten in every file.

    `answers` says what asking about it came to (asking.ask_about_forgotten); `report` is None where nothing was erased.
    """
    files = log.storage.walk()
    traces = _Traces(log, state, erased)
    traces.note_duplicates([path for path in files if kind_of(path) == "entries"])
    for done, path in enumerate(sorted(files)):
        on_progress(Progress("proving", done, len(files)))
        traces.look_into(path)
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
        live_duplicates=traces.duplicates,
        quantizer=_quantizer(log, state, erased),
        noncurrent_versions=tuple(log.storage.noncurrent()),
        work_under_way=working_on_erased(log.storage, erased.uris),
    )


@dataclass
class _Traces:
    log: VersionLog
    state: State
    erased: Facts
    found: list[Found] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = pa.array(self.erased.ids_N)
        self._id_set = set(self.erased.ids_N.tolist())
        self._uris, self._hashes = set(self.erased.uris), set(self.erased.hashes)  # and of these, no other entry's:
        self._own_uris, self._own_hashes = set(self._uris), set(self._hashes)
        self._vectors_ND = np.ascontiguousarray(self.erased.vectors_ND)
        self._own = np.ones(len(self._vectors_ND), bool)  # vectors that no live entry has as well
        for single in self.state.pending:
            self._note_duplicate(single.id, single.uri, single.sha256, self._bytes_of(single))

    def note_duplicates(self, paths: Sequence[str]) -> None:
        """Find the entries that have something of the forgotten ones and stay, before anything is held against them."""
        for path in paths:
            self._note_duplicates(pq.read_table(io.BytesIO(self.log.storage.read(path))))

    def look_into(self, path: str) -> None:
        """Read a file and note what of the forgotten stands in it."""
        if path == (self.state.weights.path if self.state.weights else ""):
            return  # named by the hash of its tensors, which no image has a part in
        data = self.log.storage.read(path)
        if path.endswith(".parquet"):
            self._look_into_rows(path, pq.read_table(io.BytesIO(data)))
        elif path.endswith(".arrow"):
            self._look_into_rows(path, pa.ipc.open_file(data).read_all())
        elif path.endswith("ids.npy"):
            ids_N = np.load(io.BytesIO(data), allow_pickle=False)
            self._note(path, "id", int(np.isin(ids_N, self.erased.ids_N).sum()))
        elif path.endswith((".faiss", ".f16")):
            self._look_for_vectors(path, data)
        else:
            self._look_into_text(path, data)

    def _look_into_rows(self, path: str, table: pa.Table) -> None:
        names = set(table.column_names)
        if "id" in names:
            self._note(path, "id", pc.sum(pc.is_in(table.column("id"), self._ids)).as_py() or 0)
        for name, wanted in (("uri", self._own_uris), ("sha256", self._own_hashes)):
            if name in names:
                hits = pc.is_in(table.column(name), pa.array(sorted(wanted), pa.string()))
                self._note(path, name, pc.sum(hits).as_py() or 0)
        if "embedding" in names:
            self._look_for_vectors(path, np.ascontiguousarray(embedding_matrix(table.column("embedding"))).tobytes())

    def _look_into_text(self, path: str, data: bytes) -> None:
        self._note(path, "id", sum(int(found) in self._id_set for found in _IDS.findall(data)))
        text = data.decode("utf-8", errors="replace")
        strings = set(_strings(text))
        self._note(path, "uri", len(strings & self._own_uris))
        self._note(path, "sha256", len(strings & self._own_hashes))
        for row, vector in enumerate(self._vectors_ND):
            if self._own[row] and encoded_vector(vector) in text:
                self._note(path, "vector", 1)

    def _look_for_vectors(self, path: str, data: bytes) -> None:
        own = self._vectors_ND[self._own]
        for dtype in (np.float16, np.float32):
            self._note(path, "vector", len(find_rows(data, np.ascontiguousarray(own, dtype))))

    def _note(self, path: str, what: str, count: int) -> None:
        if count:
            self.found.append(Found(path, what, count))

    def _note_duplicates(self, table: pa.Table) -> None:
        rows = table.filter(pc.invert(pc.is_in(table.column("id"), self._ids)))
        vectors = embedding_matrix(rows.column("embedding"))
        own = set(find_rows(np.ascontiguousarray(vectors).tobytes(), self._vectors_ND))
        wanted = pa.array(sorted(self._uris), pa.string()), pa.array(sorted(self._hashes), pa.string())
        same = pc.or_(pc.is_in(rows.column("uri"), wanted[0]), pc.is_in(rows.column("sha256"), wanted[1]))
        known = {self._vectors_ND[row].tobytes() for row in own}
        hits = np.flatnonzero(same.to_numpy() | np.array([bool(known) and v.tobytes() in known for v in vectors], bool))
        for row in hits.tolist():
            entry = {name: rows.column(name)[row].as_py() for name in ("id", "uri", "sha256")}
            self._note_duplicate(entry["id"], entry["uri"], entry["sha256"], vectors[row].tobytes())

    def _note_duplicate(self, entry_id: int, uri: str, sha256: str, vector: bytes) -> None:
        same = [name for name, is_same in (("uri", uri in self._uris), ("sha256", sha256 in self._hashes)) if is_same]
        rows = [row for row, own in enumerate(self._vectors_ND) if own.tobytes() == vector]
        if same or rows:
            self._own[rows] = False
            self._own_uris.discard(uri)
            self._own_hashes.discard(sha256)
            words = [*same, *(["vector"] if rows else [])]
            self.duplicates.append(Duplicate(entry_id, uri, " and ".join(words)))

    def _bytes_of(self, single: Single) -> bytes:
        return base64.b64decode(single.embedding)


def _quantizer(log: VersionLog, state: State, erased: Facts) -> dict[str, Any] | None:
    if state.index is None or state.index.trained is None:
        return None
    held = holds_any_vector(log.storage, state.index.trained, erased.vectors_ND)
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
    """Every string of a JSON document, or the words of what is none."""
    try:
        document = json.loads(text)
    except ValueError:
        return text.split()
    found: list[str] = []
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            found += [value, *value.split()]
        elif isinstance(value, Mapping):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            todo += value
    return found
