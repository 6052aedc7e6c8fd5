"""Files of digests: the entries of a segment by their uris, or by the sha256 of their bytes, found without a scan.

A digest is 64 bits of a hash. Rows are ordered by digest, and a row group is small: a lookup reads the footer and one
row group of one file. Whoever looks an entry up compares the whole uri or hash afterwards, so equal digests of
different names cost a read and nothing else.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store.layout import digests_path
from pipeline.store.storage.file_refs import DigestsFile, describe
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.parquet_columns import read_rows
from pipeline.store.tables.schemas import DIGESTS, write_table

DigestOf = Literal["uri", "sha256"]

HEX_DIGITS = 16  # of the 64 of a sha256
FILE_ROWS = 1 << 20  # about: rows are distributed by the first bits of their digests
GROUP_ROWS = 4_096  # about 50 KB; a file of 2 ** 20 rows has 256 groups, and a footer of 40 KB
MAX_FILES = 1 << 8  # open at once; beyond 2 ** 28 rows the files are larger


def digests_in(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The digests (uint64 [N]) of a column of hexadecimal sha256: the first eight bytes."""
    short = pc.utf8_slice_codeunits(column, 0, HEX_DIGITS)
    chunks = short.chunks if isinstance(short, pa.ChunkedArray) else [short]
    texts = "".join("".join(chunk.to_pylist()) for chunk in chunks)
    return np.frombuffer(bytes.fromhex(texts), ">u8").astype(np.uint64)


def digests_of_uris(uris: Sequence[str]) -> np.ndarray:
    """The digests (uint64 [N]) of uris: eight bytes of BLAKE2b. A million take 1 s of CPU."""
    hashed = (hashlib.blake2b(uri.encode("utf-8", "surrogatepass"), digest_size=8).digest() for uri in uris)
    return np.frombuffer(b"".join(hashed), ">u8").astype(np.uint64)


class DigestWriter:
    """Collects digests and ids in temporary files, one for each file to publish, and publishes them in order.

    Each row takes 16 bytes on the local disk until then. One file at a time is sorted in memory, about 32 MB.
    """

    def __init__(self, total: int) -> None:
        most = min(max(total // FILE_ROWS, 1), MAX_FILES)
        self._bits = (most - 1).bit_length()
        self._open = contextlib.ExitStack()
        self._buckets: list[IO[bytes]] = [
            self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # closed when they are published
            for _ in range(1 << self._bits)
        ]

    def add(self, digests_N: np.ndarray, ids_N: np.ndarray) -> None:
        """Collect rows: digests uint64 [N], and their ids int64 [N]."""
        pairs_N2 = np.stack([digests_N, ids_N.astype(np.uint64)], axis=1)
        places_N = digests_N >> np.uint64(64 - self._bits) if self._bits else np.zeros(len(digests_N), np.uint64)
        for place in np.unique(places_N).tolist():
            self._buckets[place].write(np.ascontiguousarray(pairs_N2[places_N == place]).data)

    def publish(self, storage: Storage, number: int, of: DigestOf, nonce: str) -> tuple[DigestsFile, ...]:
        """Publish the files for segment `number`, and remove the temporary ones."""
        files: list[DigestsFile] = []
        with self._open:
            for bucket in self._buckets:
                bucket.seek(0)
                pairs_N2 = np.frombuffer(bucket.read(), np.uint64).reshape(-1, 2)
                if len(pairs_N2):
                    order_N = np.lexsort((pairs_N2[:, 1], pairs_N2[:, 0]))
                    rows = pa.table([pairs_N2[order_N, 0], pairs_N2[order_N, 1].astype(np.int64)], schema=DIGESTS)
                    files.append(write_digests(storage, digests_path(number, of, len(files), nonce), rows))
        return tuple(files)


def write_digests(storage: Storage, path: str, rows: pa.Table) -> DigestsFile:
    """Publish rows of digests, which must be ordered by digest, and at least one."""
    with storage.publishing(path) as local:
        write_table(rows, local, GROUP_ROWS)
        file = describe(path, local, rows.num_rows)
    digests = rows.column("digest")
    return DigestsFile(**file.model_dump(), first=digests[0].as_py(), last=digests[-1].as_py())


def ids_with(storage: Storage, files: Iterable[DigestsFile], digests_N: np.ndarray) -> np.ndarray:
    """The ids (int64 [M] ascending) of the rows with any of these digests (uint64 [N]).

    Reads the footer and the row groups that may hold them of each file whose range they lie in. Raises DamagedFile.
    """
    wanted_N = np.unique(digests_N)
    found = [np.empty(0, np.int64)]
    for file in files:
        within = wanted_N[(wanted_N >= file.first) & (wanted_N <= file.last)]
        if len(within):
            found.append(read_rows(storage, file, within, DIGESTS.names, key="digest").column("id").to_numpy())
    return np.unique(np.concatenate(found))
