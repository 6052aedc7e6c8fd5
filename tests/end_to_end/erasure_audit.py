"""Does anything of what was erased stand in the files of a memory?

    python erasure_audit.py MEMORY VECTORS.npy IDS.txt URIS.txt HASHES.txt [KEPT.txt]

VECTORS.npy holds the vectors, float16 [N, D]; the texts hold one id, uri or sha256 a line, KEPT.txt values of other
columns, as Arrow writes them as text, that nothing else has. Every file below MEMORY is
searched, hidden and half-written ones too: its name, its raw bytes, and what it holds once decoded. Prints every hit;
exit status 1 if there is any, 0 if there is none.

This stands alone. It imports nothing of the project and knows nothing of its layout, so that it cannot share a mistake.
"""

import base64
import binascii
import io
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FLOATS = (np.float16, np.float32, np.float64)
DIGITS = re.compile(rb"\d{6,}")


class Audit:
    """What is looked for, in every form it may have been written in."""

    def __init__(
        self, vectors: np.ndarray, ids: list[int], uris: list[str], hashes: list[str], kept: Sequence[str] = ()
    ) -> None:
        self.ids = np.array(sorted(ids), np.int64)
        self.known_ids = set(ids)
        self.kept = frozenset(kept)
        # Shorter ones, and numbers, stand anywhere.
        self.texts = {text.encode(): f"kept {text}" for text in kept if len(text) > 5 and not text[:4].isdigit()}
        for uri in uris:
            for form in {uri, urllib.parse.unquote(uri), urllib.parse.quote(uri)}:
                for text in {form, json.dumps(form)[1:-1], json.dumps(form, ensure_ascii=False)[1:-1]}:
                    self.texts[text.encode("utf-8", "surrogateescape")] = f"uri {uri}"
        for digest in hashes:
            for form in (digest.encode(), digest.upper().encode(), bytes.fromhex(digest)):
                self.texts[form] = f"sha256 {digest}"
        self.vectors: dict[bytes, str] = {}
        for row, vector in enumerate(vectors):
            for kind in FLOATS:
                name = f"vector {row} as {np.dtype(kind).name}"
                self.vectors[np.ascontiguousarray(vector, kind).tobytes()] = name
        self.encoded = {base64.b64encode(raw).rstrip(b"="): f"{name} in base64" for raw, name in self.vectors.items()}

    def search(self, folder: Path) -> tuple[list[str], int, int]:
        """Hits, files and bytes."""
        hits: list[str] = []
        num_files = num_bytes = 0
        for above, _, names in os.walk(folder):
            for name in sorted(names):
                path = Path(above) / name
                data = path.read_bytes()
                num_files, num_bytes = num_files + 1, num_bytes + len(data)
                shown = str(path.relative_to(folder))
                found = dict.fromkeys(f"name: {what}" for what in self.in_bytes(shown.encode()))
                found |= dict.fromkeys(f"bytes: {what}" for what in self.in_bytes(data))
                found |= dict.fromkeys(self.in_decoded(data))
                hits += [f"{shown}: {what}" for what in found]
        return hits, num_files, num_bytes

    def in_bytes(self, data: bytes) -> Iterator[str]:
        """Texts, vectors and ids written as decimal numbers, wherever they begin."""
        for needles in (self.texts, self.vectors, self.encoded):
            yield from (what for needle, what in needles.items() if needle in data)
        for number in set(DIGITS.findall(data)):
            if len(number) < 40 and int(number) in self.known_ids:
                yield f"id {int(number)} in decimal"

    def in_decoded(self, data: bytes) -> Iterator[str]:
        """What a file says that is not plain in its bytes, by what it is, whatever its name."""
        try:
            if data[:4] == b"PAR1":
                yield from self.in_parquet(data)
            elif data[:6] == b"ARROW1":
                reader = pa.ipc.open_file(data)
                yield from self.in_metadata(reader.schema.metadata)
                yield from self.in_table(reader.read_all(), "arrow")
            elif data[:6] == b"\x93NUMPY":
                yield from self.in_array(np.load(io.BytesIO(data), allow_pickle=False), "npy")
            elif data[:1] in (b"{", b"["):
                yield from self.in_json(json.loads(data))
        except (pa.ArrowException, OSError, ValueError):
            return  # half-written: its bytes were searched all the same

    def in_parquet(self, data: bytes) -> Iterator[str]:
        file = pq.ParquetFile(io.BytesIO(data))
        yield from self.in_metadata(file.metadata.metadata)
        yield from self.in_metadata(file.schema_arrow.metadata)
        for group in range(file.metadata.num_row_groups):
            yield from self.in_table(file.read_row_group(group), "parquet")
            for column in range(file.metadata.num_columns):
                chunk = file.metadata.row_group(group).column(column)
                if chunk.statistics is not None and chunk.statistics.has_min_max:
                    for value in (chunk.statistics.min, chunk.statistics.max):
                        where = f"parquet statistics of {chunk.path_in_schema}"
                        yield from (f"{where}: {what}" for what in self.in_value(value))

    def in_metadata(self, metadata: dict[bytes, bytes] | None) -> Iterator[str]:
        for key, value in (metadata or {}).items():
            yield from (f"metadata {key!r}: {what}" for what in self.in_bytes(key + b"\n" + value))

    def in_table(self, table: pa.Table, kind: str) -> Iterator[str]:
        for name, column in zip(table.column_names, table.columns, strict=True):
            if self.kept and not pa.types.is_nested(column.type) and not pa.types.is_binary(column.type):
                there = self.kept & set(column.cast(pa.string()).unique().to_pylist())
                yield from (f"{kind} column {name}: kept {value}" for value in there)
            for chunk in column.chunks:
                yield from (f"{kind} column {name}: {what}" for what in self.in_column(chunk))

    def in_column(self, column: pa.Array) -> Iterator[str]:
        if pa.types.is_dictionary(column.type):
            yield from self.in_column(column.dictionary)
        elif pa.types.is_integer(column.type):
            yield from self.in_array(column.drop_null().to_numpy(zero_copy_only=False), "integers")
        elif pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            values = column.cast(pa.binary()).drop_null().to_pylist()
            yield from self.in_bytes(b"\n".join(values))
        elif pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
            yield from self.in_column(column.flatten())
        elif pa.types.is_floating(column.type):
            yield from self.in_bytes(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).tobytes())

    def in_array(self, array: np.ndarray, kind: str) -> Iterator[str]:
        if array.dtype.kind in "iu":
            yield from (f"{kind}: id {found}" for found in np.intersect1d(array, self.ids).tolist())
        else:
            yield from (f"{kind}: {what}" for what in self.in_bytes(np.ascontiguousarray(array).tobytes()))

    def in_json(self, value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from self.in_json(key)
                yield from self.in_json(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from self.in_json(inner)
        else:
            yield from (f"json: {what}" for what in self.in_value(value))

    def in_value(self, value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield from self.in_bytes(value.encode("utf-8", "surrogatepass"))
            try:
                yield from self.in_bytes(base64.b64decode(value, validate=True))
            except binascii.Error:
                return
        elif isinstance(value, bytes):
            yield from self.in_bytes(value)
        elif isinstance(value, int) and value in self.known_ids:
            yield f"id {value}"


def lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def main(arguments: list[str]) -> int:
    if len(arguments) not in (5, 6):
        sys.stderr.write(__doc__ or "")
        return 2
    memory, vectors, ids, uris, hashes, *kept = arguments
    values = [value for path in kept for value in lines(path)]
    wanted = Audit(np.load(vectors), [int(line) for line in lines(ids)], lines(uris), lines(hashes), values)
    hits, num_files, num_bytes = wanted.search(Path(memory))
    for hit in hits:
        print(hit)
    print(f"{len(hits)} hits in {num_files} files with {num_bytes:,} bytes")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
